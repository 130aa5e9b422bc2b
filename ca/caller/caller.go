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
	agent    bool
	tokenID  string
	peer     string
	expires  time.Time
}

// Subject is a workload that something is to be said about: the caller itself, or
// for an agent one of its node. It proves nothing.
type Subject struct {
	ID     identity.ID
	PodUID string // empty outside Kubernetes
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

// Agent reports whether the caller is the agent of its node: it runs there, in a
// pod, under a ServiceAccount that the operator named for that.
func (c *Caller) Agent() bool { return c.agent }

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

// Each tells who the caller is and how that is known, in the order of names, without
// what is empty; never the proof.
func (c *Caller) Each(tell func(name, value string)) {
	for _, of := range [...]struct{ name, value string }{
		{"audience", c.audience}, {"by", string(c.method)}, {"issuer", c.issuer}, {"node", c.node}, {"peer", c.peer},
		{"pod", c.podName}, {"pod_uid", c.podUID}, {"spiffe_id", c.id.String()}, {"token_id", c.tokenID},
	} {
		if of.value != "" {
			tell(of.name, of.value)
		}
	}
}

// LogValue is what Each tells.
func (c *Caller) LogValue() slog.Value {
	var attrs []slog.Attr
	c.Each(func(name, value string) { attrs = append(attrs, slog.String(name, value)) })
	return slog.GroupValue(attrs...)
}
