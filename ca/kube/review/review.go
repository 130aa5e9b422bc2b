package review

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc/peer"
	authentication "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/budget"
	"github.com/meshca/meshca/identity/token"
)

// limits are those of reviews. There are more of them at once than of lookups: each
// certificate costs one.
var limits = budget.Limits{Timeout: 3 * time.Second, AtOnce: 64, PerNode: 16, Waiting: 256, PerSecond: 200, Burst: 400}

// What the API server says beside the user's name, and in which form a token's ID.
const (
	podName      = "authentication.kubernetes.io/pod-name"
	podUID       = "authentication.kubernetes.io/pod-uid"
	nodeName     = "authentication.kubernetes.io/node-name"
	nodeUID      = "authentication.kubernetes.io/node-uid"
	credentialID = "authentication.kubernetes.io/credential-id"
	jtiPrefix    = "JTI="
)

// Config is what a [Reviewer] is made from.
type Config struct {
	// API says how to reach the API server, and as whom; required. Its limits on
	// requests are not used.
	API *rest.Config
	Now func() time.Time // nil means time.Now
}

// Reviewer has tokens reviewed. It is a [token.Reviewer] and safe for concurrent use.
type Reviewer struct {
	http   *http.Client
	client rest.Interface
	budget *budget.Budget
}

// New makes a Reviewer. It asks nobody yet.
func New(c Config) (*Reviewer, error) {
	if c.API == nil {
		return nil, errors.New("reviewing tokens: API must be given")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	r := &Reviewer{budget: budget.New(limits, c.Now)}
	config := rest.CopyConfig(c.API)
	config.QPS, config.RateLimiter, config.Timeout = -1, nil, 0
	config.Wrap(r.budget.Wrap)
	scheme := runtime.NewScheme()
	if err := authentication.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("reviewing tokens: %w", err)
	}
	config.APIPath, config.GroupVersion = "/apis", &authentication.SchemeGroupVersion
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.ContentType = runtime.ContentTypeJSON
	var err error
	if r.http, err = rest.HTTPClientFor(config); err != nil {
		return nil, fmt.Errorf("reviewing tokens: %w", err)
	}
	if r.client, err = rest.RESTClientForConfigAndClient(config, r.http); err != nil {
		return nil, fmt.Errorf("reviewing tokens: %w", err)
	}
	return r, nil
}

// Close lets go of idle connections.
func (r *Reviewer) Close() { r.http.CloseIdleConnections() }

// Review asks the API server about a token with these claims, which nobody has
// verified yet. The error is a [*token.InvalidError] if the token proves nothing.
func (r *Reviewer) Review(ctx context.Context, raw string, c *token.Claims) error {
	answer := new(authentication.TokenReview)
	err := r.budget.Do(ctx, source(ctx), func(ctx context.Context) error {
		return r.client.Post().Resource("tokenreviews").Body(&authentication.TokenReview{
			Spec: authentication.TokenReviewSpec{Token: raw, Audiences: []string{c.Audience()}},
		}).Do(ctx).Into(answer)
	})
	switch {
	case apierrors.IsForbidden(err):
		return fmt.Errorf(`the API server forbids to create tokenreviews; grant the CA's ServiceAccount the verb "create" on the resource "tokenreviews" of "authentication.k8s.io": %w`, err)
	case err != nil:
		return fmt.Errorf("create tokenreviews: %w", err)
	}
	return judge(&answer.Status, c)
}

// source is whom a review is counted for: the address that the call comes from, the one
// thing that is certain before the answer. What the claims say anybody can write, and
// spend another node's turns with, or have as many turns as there are names.
func source(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	if host, _, err := net.SplitHostPort(p.Addr.String()); err == nil {
		return host
	}
	return p.Addr.String()
}

// judge compares the API server's answer with the claims.
func judge(s *authentication.TokenReviewStatus, c *token.Claims) error {
	name, uid := c.Pod()
	node, nodeID := c.Node()
	user := "system:serviceaccount:" + c.Namespace() + ":" + c.ServiceAccount()
	switch {
	case !s.Authenticated:
		return invalid("the API server does not take it: %s", quote(s.Error))
	case s.Error != "":
		return invalid("the API server takes it and names an error, %s; which of the two holds cannot be told", quote(s.Error))
	case !slices.Contains(s.Audiences, c.Audience()):
		// An authenticator that knows no audiences leaves them empty: its yes is
		// about a token for anybody.
		return invalid("the API server takes it for the audiences %.256q, not for %q", s.Audiences, c.Audience())
	case s.User.Username != user:
		return invalid("the API server takes it for the user %s, and its claims are of %q", quote(s.User.Username), user)
	case c.ServiceAccountUID() != "" && s.User.UID != c.ServiceAccountUID():
		return invalid("the API server takes it for a user with UID %s, and its claims name %q", quote(s.User.UID), c.ServiceAccountUID())
	case name == "":
		return invalid("it is bound to no pod; mount a projected token")
	}
	for _, want := range []struct {
		key, value string
		required   bool
	}{
		{podName, name, true}, {podUID, uid, true},
		{nodeName, node, false}, {nodeUID, nodeID, false}, {credentialID, jtiPrefix + c.ID(), false},
	} {
		got, there := s.User.Extra[want.key]
		if !there && !want.required {
			continue
		}
		if len(got) != 1 || got[0] != want.value {
			return invalid("the API server says %s of it is %.256q, and its claims say %q", want.key, []string(got), want.value)
		}
	}
	return nil
}

func invalid(format string, args ...any) error {
	return &token.InvalidError{Reason: fmt.Sprintf(format, args...)}
}

// quote makes text of another's fit for a log line.
func quote(s string) string {
	const most = 256
	if len(s) > most {
		return strconv.Quote(s[:most]) + "…"
	}
	return strconv.Quote(s)
}
