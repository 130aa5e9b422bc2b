package caller

import (
	"log/slog"
	"time"

	"github.com/meshca/meshca/identity"
)

// Method says what proved a caller's identity.
type Method string

// The ways to prove an identity.
const (
	ByToken       Method = "token"       // a ServiceAccount token of a configured issuer
	ByCertificate Method = "certificate" // a current SVID, for IDs that the operator listed
)

// Caller is somebody who has been authenticated. Only this package makes one
// (see [Authenticator]), and signing takes nothing less: a path to the signing
// key that forgets to authenticate does not compile.
type Caller struct {
	id       identity.ID
	method   Method
	issuer   string
	audience string
	podName  string
	podUID   string
	node     string
	tokenID  string
	peer     string
	expires  time.Time
}

// ID returns the identity that the caller has proved.
func (c *Caller) ID() identity.ID { return c.id }

// Method returns what proved it.
func (c *Caller) Method() Method { return c.method }

// Pod returns the name and UID of the pod that the token is bound to; both are
// empty for a caller outside Kubernetes.
func (c *Caller) Pod() (name, uid string) { return c.podName, c.podUID }

// Node returns the name of the node that the token names; empty if none.
func (c *Caller) Node() string { return c.node }

// Token returns the issuer of the token and the audience that it was accepted
// for; both are empty for a caller by certificate.
func (c *Caller) Token() (issuer, audience string) { return c.issuer, c.audience }

// Peer returns the address that the proof was shown from; empty if it was not
// said. It is for the record and proves nothing.
func (c *Caller) Peer() string { return c.peer }

// Expires returns the instant until which the proof holds: the end of the token
// or of the certificate.
func (c *Caller) Expires() time.Time { return c.expires }

// Resource returns the name of the caller's own xDS resource: its pod's UID,
// or its SPIFFE ID where there is no pod.
func (c *Caller) Resource() string {
	if c.podUID != "" {
		return c.podUID
	}
	return c.id.String()
}

// LogValue shows who the caller is and how that is known; never the proof.
func (c *Caller) LogValue() slog.Value {
	attrs := []slog.Attr{slog.String("spiffe_id", c.id.String()), slog.String("by", string(c.method))}
	for _, a := range []slog.Attr{
		slog.String("issuer", c.issuer), slog.String("audience", c.audience),
		slog.String("pod", c.podName), slog.String("pod_uid", c.podUID),
		slog.String("node", c.node), slog.String("token_id", c.tokenID),
		slog.String("peer", c.peer),
	} {
		if a.Value.String() != "" {
			attrs = append(attrs, a)
		}
	}
	return slog.GroupValue(attrs...)
}
