package identity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// useX509SVID marks the bundle entries that vouch for X509-SVIDs
// (SPIFFE_Trust_Domain_and_Bundle §4.2.2).
const useX509SVID = "x509-svid"

// ParseBundle reads a bundle document, a JWK Set as
// SPIFFE_Trust_Domain_and_Bundle §4 defines it. The document does not name its
// trust domain, which is why the caller must (§3).
//
// Entries of an unknown use or key type are skipped (§4.1.3), and so are
// x509-svid entries without a certificate; of several certificates only the
// first counts (X509-SVID §6.2). go-spiffe fails the whole document in all of these cases but the
// first.
//
// What fails the document here is no newer dialect but a mistake or an attack:
// a certificate that cannot be an authority or that is not for the entry's key
// (RFC 7517 §4.7), text after the document, and a member that is there twice.
// Two readers of such a document can each hold another set of authorities.
func ParseBundle(td TrustDomain, doc []byte) (*Bundle, error) {
	conf, err := parseBundle(doc)
	if err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", td, err)
	}
	return NewBundle(td, conf)
}

func parseBundle(doc []byte) (BundleConfig, error) {
	var conf BundleConfig
	if len(doc) > MaxBundleBytes {
		return conf, fmt.Errorf("%d bytes, at most %d are allowed", len(doc), MaxBundleBytes)
	}
	members, err := jsonMembers(doc)
	if err != nil {
		return conf, err
	}
	if conf.Sequence, err = parseSequence(members["spiffe_sequence"]); err != nil {
		return conf, err
	}
	if conf.RefreshHint, err = parseRefreshHint(members["spiffe_refresh_hint"]); err != nil {
		return conf, err
	}
	var keys *[]json.RawMessage
	if raw, ok := members["keys"]; ok {
		if err := json.Unmarshal(raw, &keys); err != nil {
			return conf, fmt.Errorf(`"keys": %w`, err)
		}
	}
	if keys == nil {
		return conf, errors.New(`it has no "keys" (§4.1.3)`)
	}
	for i, raw := range *keys {
		a, err := parseBundleEntry(raw)
		if err != nil {
			return conf, fmt.Errorf("key %d: %w", i+1, err)
		}
		if a != nil {
			conf.Authorities = append(conf.Authorities, a)
		}
	}
	return conf, nil
}

// jsonMembers takes one JSON object apart. Unlike json.Unmarshal into a struct,
// it tells "keys" from "Keys" and refuses a member that is there twice, of
// which other readers may believe the other one.
func jsonMembers(doc []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(doc))
	if t, err := dec.Token(); err != nil {
		return nil, fmt.Errorf("it is not JSON: %w", err)
	} else if t != json.Delim('{') {
		return nil, errors.New("it is not a JSON object")
	}
	members := make(map[string]json.RawMessage)
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, fmt.Errorf("it is not JSON: %w", err)
		}
		name, _ := t.(string) // the decoder has seen to it that names are strings
		if _, twice := members[name]; twice {
			return nil, fmt.Errorf("the member %s is there twice", quote(name))
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, fmt.Errorf("the member %s: %w", quote(name), err)
		}
		members[name] = value
	}
	if _, err := dec.Token(); err != nil { // the closing brace
		return nil, fmt.Errorf("it is not JSON: %w", err)
	}
	// Only the next token tells: More says no before a stray "}", too.
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is text after the document")
	}
	return members, nil
}

// parseSequence reads spiffe_sequence, an integer of up to 64 bits (§4.1.1).
func parseSequence(raw json.RawMessage) (uint64, error) {
	if raw == nil {
		return 0, nil
	}
	v, err := strconv.ParseUint(string(raw), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("spiffe_sequence %s is not an integer of 64 bits", quote(string(raw)))
	}
	return v, nil
}

// parseRefreshHint reads spiffe_refresh_hint, whole seconds (§4.1.2).
func parseRefreshHint(raw json.RawMessage) (time.Duration, error) {
	if raw == nil {
		return 0, nil
	}
	v, err := strconv.ParseInt(string(raw), 10, 64)
	if err != nil || v < 0 || v > math.MaxInt64/int64(time.Second) {
		return 0, fmt.Errorf("spiffe_refresh_hint %s is not a number of seconds", quote(string(raw)))
	}
	return time.Duration(v) * time.Second, nil
}

// parseBundleEntry returns the authority of one JWK, or nil where the entry is
// to be ignored (§4.2, X509-SVID §6.2). Nothing of an ignored entry but its use and key type
// has to make sense.
func parseBundleEntry(raw json.RawMessage) (*x509.Certificate, error) {
	members, err := jsonMembers(raw)
	if err != nil {
		return nil, err
	}
	if jsonString(members["use"]) != useX509SVID {
		return nil, nil
	}
	switch jsonString(members["kty"]) {
	case "EC", "RSA", "OKP":
	default:
		return nil, nil
	}
	var x5c []json.RawMessage
	if raw, ok := members["x5c"]; ok {
		if err := json.Unmarshal(raw, &x5c); err != nil {
			return nil, errors.New(`"x5c" is not an array`)
		}
	}
	if len(x5c) == 0 {
		return nil, nil
	}
	// Standard base64, not the URL-safe one of the other members (RFC 7517 §4.7).
	der, err := base64.StdEncoding.Strict().DecodeString(jsonString(x5c[0]))
	if err != nil {
		return nil, fmt.Errorf(`"x5c": %w`, err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf(`"x5c": %w`, err)
	}
	return c, checkEntryKey(members, c)
}

// checkEntryKey holds RFC 7517 §4.7: the first certificate is for the key that
// the other members describe.
func checkEntryKey(members map[string]json.RawMessage, c *x509.Certificate) error {
	public := make(map[string]json.RawMessage)
	for _, name := range []string{"kty", "crv", "x", "y", "n", "e"} {
		if v, ok := members[name]; ok {
			public[name] = v
		}
	}
	doc, err := json.Marshal(public)
	if err != nil {
		return err
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(doc); err != nil {
		return fmt.Errorf("malformed key: %w", err)
	}
	key, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !key.Equal(jwk.Key) {
		return errors.New(`the certificate in "x5c" is for another key than the entry's`)
	}
	return nil
}

// jsonString returns a JSON string's value, and "" for everything else.
func jsonString(raw json.RawMessage) string {
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return ""
	}
	return s
}

// MarshalJSON returns the bundle document (§4): one x509-svid entry an
// authority, with exactly one certificate and no kid (X509-SVID §6.1), and a
// sequence. It fails for an authority whose kind of key has no JWK form.
func (b *Bundle) MarshalJSON() ([]byte, error) {
	doc := struct {
		Keys     []jose.JSONWebKey `json:"keys"`
		Sequence uint64            `json:"spiffe_sequence"`
		Refresh  int64             `json:"spiffe_refresh_hint,omitempty"`
	}{Keys: []jose.JSONWebKey{}, Sequence: b.sequence, Refresh: int64(b.refresh / time.Second)}
	for _, a := range b.authorities {
		doc.Keys = append(doc.Keys, jose.JSONWebKey{
			Key: a.PublicKey, Use: useX509SVID, Certificates: []*x509.Certificate{a},
		})
	}
	out, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("encoding the bundle of %s: %w", b.td, err)
	}
	return out, nil
}
