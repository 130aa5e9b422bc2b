package files

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// findPath finds the way from the given certificate to one of the roots by signatures,
// in whatever order the chain was given. A root that is in the chain too, as Istio's
// recipe puts it there, is only a root.
func (m *material) findPath(now time.Time) ([]*x509.Certificate, error) {
	if slices.ContainsFunc(m.roots, m.cert.Equal) {
		return []*x509.Certificate{m.cert}, nil
	}
	w := walk{now: now, roots: m.roots}
	for _, c := range m.chain {
		if !c.Equal(m.cert) && !slices.ContainsFunc(m.roots, c.Equal) && !slices.ContainsFunc(w.chain, c.Equal) {
			w.chain = append(w.chain, c)
		}
	}
	if path := w.up(m.cert); path != nil {
		return path, nil
	}
	var weak x509.InsecureAlgorithmError
	if errors.As(w.refused, &weak) {
		file := m.chainFile()
		if w.end.Equal(m.cert) {
			file = m.files.cert
		}
		return nil, &Error{File: file, Reason: fmt.Sprintf("%s is signed with %v, which can be forged", name(w.end), x509.SignatureAlgorithm(weak)), Do: "have it signed again with SHA-256 or better", Err: w.refused}
	}
	reason := fmt.Sprintf("no certificate here has signed %s; it names %.128q as its issuer", name(w.end), w.end.Issuer.String())
	if w.refused != nil {
		reason = fmt.Sprintf("the signature on %s does not verify with the key of %.128q: %v", name(w.end), w.end.Issuer.String(), w.refused)
	}
	return nil, &Error{File: m.files.roots, Reason: "the chain does not reach a root: " + reason, Do: fmt.Sprintf("put the root here, and what is between in %q", m.chainFile()), Err: w.refused}
}

// walk is a search for a path. Each certificate of the chain is tried once: from one
// that led nowhere, nothing leads anywhere.
type walk struct {
	now          time.Time
	chain, roots []*x509.Certificate

	end     *x509.Certificate // where the search got stuck first
	refused error             // why a certificate with the name of its issuer was not it
}

func (w *walk) up(c *x509.Certificate) []*x509.Certificate {
	root, refused := w.signer(c, w.roots)
	if root != nil {
		return []*x509.Certificate{c, root}
	}
	for {
		next, why := w.signer(c, w.chain)
		if next == nil {
			if w.end == nil {
				w.end, w.refused = c, cmp.Or(refused, why)
			}
			return nil
		}
		w.chain = slices.DeleteFunc(w.chain, next.Equal)
		if path := w.up(next); path != nil {
			return append([]*x509.Certificate{c}, path...)
		}
	}
}

// signer returns the certificate that has signed c, and of several with one key one
// that holds now; or else why one with the issuer's name has not.
func (w *walk) signer(c *x509.Certificate, among []*x509.Certificate) (found *x509.Certificate, refused error) {
	for _, s := range among {
		if !bytes.Equal(s.RawSubject, c.RawIssuer) {
			continue
		}
		if err := c.CheckSignatureFrom(s); err != nil {
			refused = err
		} else if found == nil || !w.holds(found) && w.holds(s) {
			found = s
		}
	}
	return found, refused
}

func (w *walk) holds(c *x509.Certificate) bool {
	return !w.now.Before(c.NotBefore) && w.now.Before(c.NotAfter)
}
