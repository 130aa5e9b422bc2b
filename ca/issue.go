package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/identity"
)

// Issued is a new X509-SVID without its key, which only the caller has.
type Issued struct {
	Chain  []*x509.Certificate // leaf first, then the intermediates, no root
	Bundle *identity.Bundle    // of the caller's trust domain, with the chain's root
}

// Issue signs an X509-SVID for who, over the public key pub. The identity is
// the caller's and nothing else can name it.
//
// lifetime counts from now: zero or less means the default, and the configured
// limits bound it. It is shortened to the issuer's end.
//
// Errors: [*KeyError], [*LifetimeError], [*NotReadyError], [*AuditError]; any
// other means that signing failed. Issue takes no lock and is safe for
// concurrent use.
func (a *Authority) Issue(ctx context.Context, who *caller.Caller, pub crypto.PublicKey, lifetime time.Duration) (*Issued, error) {
	issued, err := a.issue(ctx, who, pub, lifetime)
	a.metrics.signed(KindSVID, err)
	return issued, err
}

func (a *Authority) issue(ctx context.Context, who *caller.Caller, pub crypto.PublicKey, lifetime time.Duration) (*Issued, error) {
	if who == nil || who.ID().IsZero() {
		return nil, errors.New("issuing an SVID: the caller has not been authenticated")
	}
	if td := who.ID().TrustDomain(); td != a.td || who.ID().Path() == "" {
		return nil, fmt.Errorf("issuing an SVID for %s: this authority issues for workloads of trust domain %q", who.ID(), a.td)
	}
	k, err := checkedKey(pub)
	if err != nil {
		return nil, err
	}
	is, err := a.current()
	if err != nil {
		return nil, err
	}
	chain, err := a.sign(ctx, is, order{
		kind: KindSVID, id: who.ID(), who: who, pub: k, lifetime: a.leaf.clamp(lifetime),
	})
	if err != nil {
		return nil, err
	}
	return &Issued{Chain: chain, Bundle: is.bundle}, nil
}

// ServingNames are the names of the CA's own TLS certificate. Clients verify
// them as TLS clients verify hosts; no SPIFFE ID is among them.
type ServingNames struct {
	DNS []string // lower case, no wildcards
	IPs []net.IP
}

// IssueServing signs a TLS server certificate for the CA itself, of the default
// lifetime. It is for this process's own listeners: nothing on the wire leads
// here. Errors are those of [Authority.Issue].
func (a *Authority) IssueServing(ctx context.Context, names ServingNames, pub crypto.PublicKey) ([]*x509.Certificate, error) {
	chain, err := a.issueServing(ctx, names, pub)
	a.metrics.signed(KindServing, err)
	return chain, err
}

func (a *Authority) issueServing(ctx context.Context, names ServingNames, pub crypto.PublicKey) ([]*x509.Certificate, error) {
	if err := names.Validate(); err != nil {
		return nil, fmt.Errorf("issuing a serving certificate: %w", err)
	}
	k, err := checkedKey(pub)
	if err != nil {
		return nil, err
	}
	is, err := a.current()
	if err != nil {
		return nil, err
	}
	return a.sign(ctx, is, order{kind: KindServing, names: names, pub: k, lifetime: a.leaf.Lifetime})
}

func checkedKey(pub crypto.PublicKey) (publicKey, error) {
	if err := CheckKey(pub); err != nil {
		return publicKey{}, err
	}
	return newPublicKey(pub)
}

const maxServingNames = 100

// Validate returns nil if the names can stand in a certificate: at least one, host
// names in lower case without wildcards, addresses that a client could dial.
func (n ServingNames) Validate() error {
	switch total := len(n.DNS) + len(n.IPs); {
	case total == 0:
		return errors.New("no name is given")
	case total > maxServingNames:
		return fmt.Errorf("%d names are given; at most %d are allowed", total, maxServingNames)
	}
	for _, name := range n.DNS {
		if !isHostname(name) {
			return fmt.Errorf("%.256q is not a host name in lower case", name)
		}
	}
	for _, ip := range n.IPs {
		if len(ip) != net.IPv4len && len(ip) != net.IPv6len || ip.IsUnspecified() {
			return fmt.Errorf("%.256q is not an address that a client could dial", ip.String())
		}
	}
	return nil
}

// isHostname is RFC 1123's host name, in lower case and not an IPv4 address.
func isHostname(s string) bool {
	if len(s) == 0 || len(s) > 253 || net.ParseIP(s) != nil {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			c := label[i]
			if ('a' > c || c > 'z') && ('0' > c || c > '9') && c != '-' {
				return false
			}
		}
	}
	return true
}

// order is what [Authority.sign] is to make. who is set exactly if kind is
// KindSVID, names if it is KindServing.
type order struct {
	kind     Kind
	id       identity.ID
	who      *caller.Caller
	names    ServingNames
	pub      publicKey
	lifetime time.Duration
}

func (o *order) subject() string {
	switch {
	case o.kind != KindServing:
		return o.id.String()
	case len(o.names.DNS) > 0:
		return o.names.DNS[0]
	}
	return o.names.IPs[0].String()
}

// sign is the one place where a key of this authority signs. The order of its
// steps must not change: decide everything, record the intent, sign, record
// the outcome, and only then let the certificate out. A certificate whose
// second record fails stays in here (CVE-2026-46405 let such a thing out).
func (a *Authority) sign(ctx context.Context, is *issuer, o order) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("issuing for %q: %w", o.subject(), err)
	}
	v, err := a.validity(is, &o)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial(a.random)
	if err != nil {
		return nil, err
	}
	var template *x509.Certificate
	if o.kind == KindServing {
		template = servingTemplate(o.names, o.pub, serial, v)
	} else {
		template = svidTemplate(o.id, o.pub, serial, v)
	}

	event := o.event(is, serial, v)
	if err := a.record(ctx, Intent, event); err != nil {
		return nil, err
	}
	leaf, err := makeLeaf(template, is, o.pub)
	if err != nil {
		event.Err = fmt.Errorf("issuing for %q: %w", o.subject(), err)
		if rerr := a.record(ctx, Failed, event); rerr != nil {
			return nil, errors.Join(event.Err, rerr)
		}
		return nil, event.Err
	}
	if err := a.record(ctx, Done, event); err != nil {
		return nil, err
	}
	return append([]*x509.Certificate{leaf}, is.chain...), nil
}

// makeLeaf signs the template and reads the result back. crypto/x509 itself
// checks the signature that the key made (a faulty one could give the key
// away); reading back shows that what is signed is what was meant.
func makeLeaf(template *x509.Certificate, is *issuer, pub publicKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, is.cert(), pub.key, is.key)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading back the new certificate: %w", err)
	}
	key, ok := pub.key.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !key.Equal(leaf.PublicKey) || leaf.IsCA || leaf.NotAfter.After(is.end) {
		return nil, errors.New("the new certificate is not the one that was meant")
	}
	return leaf, nil
}

// validity says from when until when the certificate of an order is to hold.
func (a *Authority) validity(is *issuer, o *order) (validity, error) {
	now := a.now()
	if now.Before(is.begin) {
		return validity{}, &NotReadyError{Reason: fmt.Sprintf(
			"this clock shows %s, and the intermediate begins at %s: the clock has been set back, or was ahead when the intermediate was made", stamp(now), stamp(is.begin))}
	}
	v, ok := validityAt(now, o.lifetime, is.begin, is.end)
	if !ok {
		return validity{}, &LifetimeError{
			For: o.subject(), Asked: o.lifetime, Left: v.lifetime, Least: leastLeft(o.lifetime), IssuerEnd: is.end,
		}
	}
	return v, nil
}
