package files

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

// maxChain bounds the certificates between ours and the root: each peer verifies them
// at each handshake.
const maxChain = 10

var pemBegin = []byte("-----BEGIN ")

// material is a set that could be parsed. How its parts go together is judged by
// [newSet].
type material struct {
	files names
	cert  *x509.Certificate
	key   crypto.Signer
	chain []*x509.Certificate // what else was given beside the roots, in any order
	roots []*x509.Certificate
}

// parse reads certificates and key. The certificate's key is looked at before the
// private one is parsed, and both before anything is verified with them.
func (c *contents) parse() (*material, error) {
	m := &material{files: c.names}
	given, err := parseCertificates(c.cert, c.certPEM, maxChain)
	if err != nil {
		return nil, err
	}
	if m.roots, err = parseCertificates(c.roots, c.rootsPEM, identity.MaxBundleAuthorities); err != nil {
		return nil, err
	}
	m.cert, m.chain = given[0], given[1:]
	if c.chain != "" {
		more, err := parseCertificates(c.chain, c.chainPEM, maxChain)
		if err != nil {
			return nil, err
		}
		m.chain = append(m.chain, more...)
	}
	if err := c.checkMode(); err != nil {
		return nil, err
	}
	if m.key, err = parseKey(c.keyPEM); err != nil {
		return nil, &Error{File: c.key, Reason: err.Error(), Do: "give the CA's private key alone, PEM, not encrypted"}
	}
	if err := c.checkPair(m, given); err != nil {
		return nil, err
	}
	return m, nil
}

// checkMode refuses a key that others than its owner could read or change. In a volume
// that a kubelet writes the bits say nothing: it is mounted into one pod and seen by
// nobody else, and a pod that runs as another user than root can read a Secret's file
// only because fsGroup or defaultMode has opened it. There they are not looked at.
func (c *contents) checkMode() error {
	if c.projected || c.keyMode.Perm()&0o077 == 0 {
		return nil
	}
	return &Error{
		File: c.key, Reason: fmt.Sprintf("others than its owner can read or change it (%s)", c.keyMode),
		Do: "run chmod 600 on it, and take the key for known if others use this machine",
	}
}

// checkPair demands that the key is the certificate's.
func (c *contents) checkPair(m *material, given []*x509.Certificate) error {
	i := slices.IndexFunc(given, func(g *x509.Certificate) bool { return belongs(m.key, g) })
	switch {
	case i == 0:
		return nil
	case i > 0:
		return &Error{File: c.cert, Reason: fmt.Sprintf("the key belongs to certificate %d of it, %s", i+1, name(given[i])), Do: "put that one first"}
	}
	return &Error{
		File: c.key, Reason: fmt.Sprintf("it is not the key of the certificate in %q, %s", c.cert, name(m.cert)),
		Do: "put certificate and key there that were made for each other",
	}
}

func belongs(key crypto.Signer, c *x509.Certificate) bool {
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && pub.Equal(c.PublicKey)
}

// parseCertificates reads a file of authorities, at most so many.
func parseCertificates(file string, data []byte, most int) ([]*x509.Certificate, error) {
	if n := bytes.Count(data, pemBegin); n > most {
		return nil, &Error{File: file, Reason: fmt.Sprintf("it holds %d PEM blocks; at most %d are taken", n, most), Do: "leave out what the path to the root does not need"}
	}
	certs, err := identity.ParsePEM(data)
	if err != nil {
		return nil, &Error{File: file, Reason: err.Error(), Do: "give certificates in PEM and nothing else", Err: err}
	}
	for i, c := range certs {
		if slices.ContainsFunc(certs[:i], c.Equal) {
			return nil, &Error{File: file, Reason: fmt.Sprintf("it holds %s twice", name(c)), Do: "leave one out"}
		}
		if err := ca.CheckKey(c.PublicKey); err != nil {
			return nil, &Error{File: file, Reason: fmt.Sprintf("%s: %v", name(c), err), Do: "have it made with a key that is taken", Err: err}
		}
	}
	return certs, nil
}

// parseKey reads one private key. What it says of a bad one repeats nothing of it.
func parseKey(data []byte) (crypto.Signer, error) {
	text := bytes.TrimSpace(data)
	// "openssl ecparam -genkey" writes the curve's name before the key.
	if bytes.HasPrefix(text, []byte("-----BEGIN EC PARAMETERS-----")) {
		_, rest := pem.Decode(text)
		text = bytes.TrimSpace(rest)
	}
	switch n := bytes.Count(text, pemBegin); {
	case n == 0 || !bytes.HasPrefix(text, pemBegin):
		return nil, errors.New("it does not begin with a PEM block")
	case n > 1:
		return nil, fmt.Errorf("it holds %d PEM blocks", n)
	}
	block, rest := pem.Decode(text)
	switch {
	case block == nil || len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("its PEM block is malformed, or text follows it")
	case block.Type == "ENCRYPTED PRIVATE KEY" || len(block.Headers) > 0:
		return nil, errors.New("the key is encrypted, and nobody is there to type a password")
	}
	defer clear(block.Bytes)
	var parsed any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		parsed, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		parsed, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		parsed, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		return nil, errors.New("its PEM block is no private key")
	}
	key, ok := parsed.(crypto.Signer)
	if err != nil || !ok {
		return nil, errors.New("its PEM block holds no key that can sign")
	}
	return key, nil
}

func name(c *x509.Certificate) string { return fmt.Sprintf("%.128q", c.Subject.String()) }
