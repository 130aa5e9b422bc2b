package csr

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	"github.com/meshca/meshca/identity"
)

// MaxPEM bounds a CSR, in bytes of PEM. The largest acceptable one, RSA 4096
// with an ID of 2048 bytes, has less than half of it.
const MaxPEM = 16 << 10

const (
	pemType  = "CERTIFICATE REQUEST" // RFC 7468 §7
	pemBegin = "-----BEGIN "
)

// RefusedError says why a CSR was refused. The text is for the CA's log: parts
// of it come from the caller, quoted and cut.
type RefusedError struct {
	Caller identity.ID // who sent it
	Reason string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("refusing the CSR of %s: %s", e.Caller, e.Reason)
}

// fault is a reason found below the level that knows the caller.
type fault string

func (f fault) Error() string { return string(f) }

func faultf(format string, args ...any) error { return fault(fmt.Sprintf(format, args...)) }

// Parse returns the public key of a CSR in PEM (RFC 2986 in RFC 7468's armor).
//
// Accepted is one block of type CERTIFICATE REQUEST without headers, and
// nothing around it but a line end, whose
//
//   - key is P-256, P-384, Ed25519, or RSA of 2048 to 4096 bits with exponent
//     65537, and none whose private half can be found in no time;
//   - signature is by that key, over SHA-256 or better;
//   - subject is empty, or one empty organization (pilot-agent's);
//   - attributes are none, or one extension request for one subject alternative
//     name that holds the caller's own ID and nothing else.
//
// Every error is a [*RefusedError].
func Parse(text []byte, caller identity.ID) (crypto.PublicKey, error) {
	key, err := parse(text, caller)
	if err != nil {
		return nil, &RefusedError{Caller: caller, Reason: err.Error()}
	}
	return key, nil
}

func parse(text []byte, caller identity.ID) (crypto.PublicKey, error) {
	der, err := dearmor(text)
	if err != nil {
		return nil, err
	}
	r, err := split(der)
	if err != nil {
		return nil, err
	}
	if err := checkKey(r.spki); err != nil {
		return nil, err
	}
	if err := checkSubject(r.subject); err != nil {
		return nil, err
	}
	if err := checkAttributes(r.attributes, caller); err != nil {
		return nil, err
	}
	return checkSignature(der, r.spki)
}

// dearmor takes off the PEM. encoding/pem skips text and broken blocks until it
// finds a good one, which would let two readers see two requests in one text;
// so the block must begin at the first byte, and there must be no second.
func dearmor(text []byte) ([]byte, error) {
	switch {
	case len(text) == 0:
		return nil, fault("it is empty")
	case len(text) > MaxPEM:
		return nil, faultf("it has %d bytes; at most %d are allowed", len(text), MaxPEM)
	case !bytes.HasPrefix(text, []byte(pemBegin)):
		// Without a word of it: it may be a token or a key in the wrong place.
		return nil, fault("it does not begin with a PEM block; send the CSR in PEM, and nothing before it")
	case bytes.Count(text, []byte(pemBegin)) > 1:
		return nil, fault("it has more than one PEM block")
	}
	block, rest := pem.Decode(text)
	switch {
	case block == nil:
		return nil, fault("its PEM is malformed")
	case strings.HasSuffix(block.Type, "PRIVATE KEY"):
		return nil, faultf("it is a private key; send a %q made from another one, this one is known to others now", pemType)
	case block.Type != pemType:
		return nil, faultf("its PEM block is of type %.80q; only %q is accepted", block.Type, pemType)
	case len(block.Headers) != 0:
		return nil, fault("its PEM block has headers")
	case len(bytes.TrimRight(rest, "\r\n")) != 0:
		return nil, faultf("there are %d bytes after its PEM block", len(rest))
	}
	return block.Bytes, nil
}

// Signature algorithms that prove possession. SHA-1 and MD5 are not among
// them; crypto/x509 alone would still accept SHA-1 in a CSR.
var signatureAlgorithms = []x509.SignatureAlgorithm{
	x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
	x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
	x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
	x509.PureEd25519,
}

// checkSignature does what needs arithmetic, on a request that is acceptable in
// every other way.
func checkSignature(der, spki []byte) (crypto.PublicKey, error) {
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, faultf("it does not parse: %.256q", err.Error())
	}
	if !bytes.Equal(req.RawSubjectPublicKeyInfo, spki) {
		// Two readers of the same bytes must not see two keys: what was judged
		// is what is certified.
		return nil, fault("its public key cannot be told for certain")
	}
	if !slices.Contains(signatureAlgorithms, req.SignatureAlgorithm) {
		return nil, faultf("it is signed with %.80q; use SHA-256 or better, or Ed25519", req.SignatureAlgorithm.String())
	}
	if err := req.CheckSignature(); err != nil {
		return nil, faultf("its signature is not by its own key: %.256q", err.Error())
	}
	if err := checkFactors(req.PublicKey); err != nil {
		return nil, err
	}
	return req.PublicKey, nil
}
