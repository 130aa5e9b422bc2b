package vault

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/inputfile"
)

// signRequest is the question for a signature. All values are strings, the form in
// which a policy in Vault compares them without surprises, and each that decides
// what is signed is given: a default that changes must not change certificates.
// docs/vault.md has the policy that allows these and no others.
func (u *Upstream) signRequest(req ca.IntermediateRequest) (request, error) {
	name := req.CSR.Subject
	if len(name.Organization) != 1 || name.CommonName == "" || name.SerialNumber == "" {
		return request{}, fmt.Errorf("asking Vault for an intermediate: the CSR's subject is %q; want O, CN and serialNumber", name)
	}
	return request{
		doing:  "having an intermediate signed",
		method: http.MethodPut, token: u.session.token, timeout: signTimeout,
		path: u.config.Mount + "/issuer/" + u.config.Issuer + "/sign-intermediate",
		body: map[string]any{
			"csr":    string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: req.CSR.Raw})),
			"format": "pem",
			// Of the CSR, the key and nothing else: with its values Vault would take all
			// extensions that are in it.
			"use_csr_values":       "false",
			"common_name":          name.CommonName,
			"organization":         name.Organization[0],
			"serial_number":        name.SerialNumber,
			"exclude_cn_from_sans": "true",
			"uri_sans":             req.TrustDomain.ID().String(),
			"max_path_length":      "0", // without it, none is set
			"key_usage":            "CertSign,CRLSign",
			"ttl":                  TTL(req.Lifetime),
			"not_before_duration":  TTL(ca.Backdate),
			// What would live longer than its issuer is cut to the issuer's end,
			// whatever the issuer is set to do with leaves.
			"enforce_leaf_not_after_behavior": "false",
		},
	}, nil
}

// TTL is a duration as it is written in requests, and so in the policy: hours,
// minutes and seconds, without those that are zero. A policy compares it by its text.
func TTL(d time.Duration) string {
	d = d.Truncate(time.Second)
	var s strings.Builder
	for _, part := range []struct {
		unit   time.Duration
		letter string
	}{{time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if n := d / part.unit; n > 0 {
			fmt.Fprintf(&s, "%d%s", n, part.letter)
			d -= n * part.unit
		}
	}
	if s.Len() == 0 {
		return "0s"
	}
	return s.String()
}

const (
	maxCertificates = 32 // in an answer
	maxDepth        = 8  // of a chain
	maxChecks       = 128
)

// read takes the chain out of an answer and holds it against the request. An answer
// may repeat the new certificate in its chain, hold the root or not, and others
// beside; only signatures say what belongs to it.
func read(answer *api.Secret, req ca.IntermediateRequest, roots []*x509.Certificate, now time.Time) (*ca.Signed, error) {
	made, err := parse(text(answer, "certificate"))
	if err != nil {
		return nil, fmt.Errorf("the certificate in it: %w", err)
	}
	if len(made) != 1 {
		return nil, fmt.Errorf("%d certificates where one was asked for", len(made))
	}
	given := []string{text(answer, "issuing_ca")}
	list, _ := answer.Data["ca_chain"].([]any)
	for _, v := range list {
		s, _ := v.(string)
		given = append(given, s)
	}
	var others []*x509.Certificate
	for _, s := range given {
		if strings.TrimSpace(s) == "" {
			continue
		}
		certs, err := parse(s)
		if err != nil {
			return nil, fmt.Errorf("the chain in it: %w", err)
		}
		if others = append(others, certs...); len(others) > maxCertificates {
			return nil, fmt.Errorf("the chain in it has more than %d certificates", maxCertificates)
		}
	}
	b := pathBuilder{others: others, roots: roots}
	chain := b.from(made)
	if chain == nil {
		return nil, fmt.Errorf("no signatures lead from %q (issuer %q) to any of the roots %q", made[0].Subject, made[0].Issuer, names(roots))
	}
	s := &ca.Signed{Chain: chain, Roots: roots}
	if err := s.Check(req, now); err != nil {
		return nil, err
	}
	return s, nil
}

// parse reads PEM that Vault has sent.
func parse(s string) ([]*x509.Certificate, error) {
	return identity.ParsePEM([]byte(strings.TrimSpace(s)))
}

// pathBuilder finds a way up to a root by signatures.
type pathBuilder struct {
	others, roots []*x509.Certificate
	checks        int
}

// from returns chain with those that lead to a root, but without it; nil if there is
// no way.
func (b *pathBuilder) from(chain []*x509.Certificate) []*x509.Certificate {
	last := chain[len(chain)-1]
	if slices.ContainsFunc(b.roots, func(r *x509.Certificate) bool { return b.signed(last, r) }) {
		return chain
	}
	if len(chain) == maxDepth {
		return nil
	}
	for _, c := range b.others {
		if slices.ContainsFunc(chain, c.Equal) || slices.ContainsFunc(b.roots, c.Equal) || !b.signed(last, c) {
			continue
		}
		if whole := b.from(append(slices.Clip(chain), c)); whole != nil {
			return whole
		}
	}
	return nil
}

func (b *pathBuilder) signed(c, by *x509.Certificate) bool {
	if !bytes.Equal(c.RawIssuer, by.RawSubject) {
		return false
	}
	// Many certificates of one name would make many paths.
	b.checks++
	return b.checks <= maxChecks && c.CheckSignatureFrom(by) == nil
}

// roots are the certificates of the file of roots.
type roots struct {
	certs   []*x509.Certificate
	content []byte
	said    string
}

func (r *roots) read(path string) error {
	content, err := inputfile.Read(path, identity.MaxCertificatePEM)
	if err != nil {
		return err
	}
	certs, err := identity.ParsePEM(content)
	if err != nil {
		return fmt.Errorf("file %q: %w", path, err)
	}
	for _, c := range certs {
		if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 || c.CheckSignatureFrom(c) != nil {
			return fmt.Errorf("file %q: %q is no root: want CA certificates that may sign others and are signed by themselves", path, c.Subject)
		}
	}
	if len(certs) == 0 {
		return errors.New("none in it")
	}
	// Of two with one key the one that ends later is tried first.
	slices.SortStableFunc(certs, func(a, b *x509.Certificate) int { return b.NotAfter.Compare(a.NotAfter) })
	r.certs, r.content, r.said = certs, content, ""
	return nil
}

// reread reads the file again and reports whether there are other roots now. One that
// cannot be read changes nothing.
func (r *roots) reread(path string, log *slog.Logger) bool {
	content, err := inputfile.Read(path, identity.MaxCertificatePEM)
	if err == nil && bytes.Equal(content, r.content) {
		r.said = ""
		return false
	}
	old := r.certs
	if err == nil {
		err = r.read(path)
	}
	if err != nil {
		if err.Error() != r.said {
			log.Error("the file of roots cannot be read again; the last good roots stay in use", "error", err)
			r.said = err.Error()
		}
		return false
	}
	return !slices.EqualFunc(old, r.certs, func(a, b *x509.Certificate) bool { return a.Equal(b) })
}
