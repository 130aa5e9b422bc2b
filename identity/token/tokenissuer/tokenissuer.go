package tokenissuer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/meshca/meshca/identity/token"
)

// Config says what an Issuer is.
type Config struct {
	// URL is what tokens name as their issuer. Nothing is served there.
	URL string
	// Key signs. A new P-256 key if nil; an RSA key signs with RS256, as most API
	// servers do.
	Key crypto.Signer
	// Now is the clock; time.Now if nil.
	Now func() time.Time
}

// Issuer mints tokens. It is safe for concurrent use.
type Issuer struct {
	url    string
	key    token.Key
	signer jose.Signer
	jwks   []byte
	now    func() time.Time
}

// New makes an issuer.
func New(c Config) (*Issuer, error) {
	if c.URL == "" {
		return nil, errors.New("token issuer: its URL is empty")
	}
	i := &Issuer{url: c.URL, now: c.Now}
	if i.now == nil {
		i.now = time.Now
	}
	key := c.Key
	if key == nil {
		made, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("token issuer: making a key: %w", err)
		}
		key = made
	}
	algorithms := token.AlgorithmsFor(key.Public())
	if len(algorithms) == 0 {
		return nil, fmt.Errorf("token issuer: a key of type %T and its size cannot sign tokens", key.Public())
	}
	alg := algorithms[0]
	kid, err := keyID(key.Public())
	if err != nil {
		return nil, fmt.Errorf("token issuer: %w", err)
	}
	i.key = token.Key{ID: kid, Algorithms: []string{alg}, Public: key.Public()}
	switch key.(type) {
	case *ecdsa.PrivateKey, *rsa.PrivateKey: // what go-jose signs with by itself
	default:
		return nil, fmt.Errorf("token issuer: a key of type %T is not supported", key)
	}
	i.signer, err = jose.NewSigner(
		jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg), Key: jose.JSONWebKey{Key: key, KeyID: kid}}, nil)
	if err != nil {
		return nil, fmt.Errorf("token issuer: %w", err)
	}
	i.jwks, err = json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: key.Public(), KeyID: kid, Algorithm: alg, Use: "sig"}}})
	if err != nil {
		return nil, fmt.Errorf("token issuer: %w", err)
	}
	return i, nil
}

// keyID names a key by its content, as API servers do: a replaced key cannot
// carry the old one's name.
func keyID(pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return base64.RawURLEncoding.EncodeToString(sum[:]), nil
}

// URL returns what tokens name as their issuer.
func (i *Issuer) URL() string { return i.url }

// JWKS returns the issuer's public keys as a JWK Set. The caller owns the bytes.
func (i *Issuer) JWKS() []byte { return append([]byte(nil), i.jwks...) }

// Keys makes the issuer a [token.KeySource] for verifiers in the same process.
func (i *Issuer) Keys(_ context.Context, kid string) ([]token.Key, error) {
	if kid != i.key.ID {
		return nil, nil
	}
	return []token.Key{i.key}, nil
}

// Claims are what a token says. Fields that are empty are left out, except that
// a ServiceAccount always has a UID.
type Claims struct {
	Namespace, ServiceAccount string
	ServiceAccountUID         string // derived from the names if empty
	PodName, PodUID           string
	NodeName, NodeUID         string
	Audience                  []string
	Lifetime                  time.Duration // whole seconds count
}

// Issue mints a token that is valid from now on.
func (i *Issuer) Issue(c Claims) (string, error) {
	payload, err := i.payload(c)
	if err != nil {
		return "", fmt.Errorf("issuing a token for %q: %w", c.Namespace+"/"+c.ServiceAccount, err)
	}
	jws, err := i.signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("issuing a token for %q: %w", c.Namespace+"/"+c.ServiceAccount, err)
	}
	return jws.CompactSerialize()
}

type object struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

type kubeClaims struct {
	Namespace      string  `json:"namespace"`
	Node           *object `json:"node,omitempty"`
	Pod            *object `json:"pod,omitempty"`
	ServiceAccount object  `json:"serviceaccount"`
}

type payload struct {
	Audience  []string   `json:"aud"`
	Expires   int64      `json:"exp"`
	IssuedAt  int64      `json:"iat"`
	Issuer    string     `json:"iss"`
	ID        string     `json:"jti"`
	Kube      kubeClaims `json:"kubernetes.io"`
	NotBefore int64      `json:"nbf"`
	Subject   string     `json:"sub"`
}

func (i *Issuer) payload(c Claims) ([]byte, error) {
	switch {
	case c.Namespace == "" || c.ServiceAccount == "":
		return nil, errors.New("a namespace and a service account are needed")
	case len(c.Audience) == 0:
		return nil, errors.New("an audience is needed")
	case c.Lifetime < time.Second:
		return nil, fmt.Errorf("a lifetime of %s is too short; 1s is the least", c.Lifetime)
	case (c.PodName == "") != (c.PodUID == ""):
		return nil, errors.New("a pod needs a name and a UID")
	case (c.NodeName == "") != (c.NodeUID == ""):
		return nil, errors.New("a node needs a name and a UID")
	}
	now := i.now().Unix()
	p := payload{
		Audience: c.Audience, Issuer: i.url, ID: newUUID(),
		Expires: now + int64(c.Lifetime/time.Second), IssuedAt: now, NotBefore: now,
		Subject: "system:serviceaccount:" + c.Namespace + ":" + c.ServiceAccount,
		Kube: kubeClaims{
			Namespace:      c.Namespace,
			ServiceAccount: object{c.ServiceAccount, c.ServiceAccountUID},
		},
	}
	if c.ServiceAccountUID == "" {
		sum := sha256.Sum256([]byte(p.Subject))
		p.Kube.ServiceAccount.UID = uuid([16]byte(sum[:16]))
	}
	if c.PodName != "" {
		p.Kube.Pod = &object{c.PodName, c.PodUID}
	}
	if c.NodeName != "" {
		p.Kube.Node = &object{c.NodeName, c.NodeUID}
	}
	return json.Marshal(p)
}

// newUUID makes a random UUID (RFC 9562 §5.4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return uuid(b)
}

func uuid(b [16]byte) string {
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
