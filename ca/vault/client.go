package vault

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/inputfile"
)

const (
	maxAnswer   = 1 << 20
	maxReason   = 300 // bytes of what Vault says that are repeated
	dialTimeout = 3 * time.Second
)

// request is one question to Vault.
type request struct {
	doing   string // for errors, such as "logging in"
	method  string // GET or PUT
	path    string // below /v1/
	body    map[string]any
	token   string   // the token to show; empty for none
	secrets []string // of the body: nothing that is printed may hold them
	timeout time.Duration
}

// send asks the server at an address once. There is no retry below this.
func (u *Upstream) send(ctx context.Context, address string, r request) (*api.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	client, err := u.client(address, r.token, u.config.Namespace)
	if err != nil {
		return nil, u.failure(address, r, err)
	}
	var s *api.Secret
	if r.method == http.MethodGet {
		s, err = client.Logical().ReadWithContext(ctx, r.path)
	} else {
		s, err = client.Logical().WriteWithContext(ctx, r.path, r.body)
	}
	if err != nil {
		return nil, u.failure(address, r, err)
	}
	return s, nil
}

// health asks the server at an address how it is, which needs no token. The
// question is for the server as a whole, so it is asked outside of any namespace.
func (u *Upstream) health(ctx context.Context, address string) (*api.HealthResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	r := request{doing: "asking how it is", path: "sys/health", method: http.MethodGet}
	client, err := u.client(address, "", "")
	if err != nil {
		return nil, u.failure(address, r, err)
	}
	h, err := client.Sys().HealthWithContext(ctx)
	if err != nil {
		return nil, u.failure(address, r, err)
	}
	return h, nil
}

// client makes a client for one request. Requests are rare, so a connection is not
// kept: the CA file counts as it is now.
func (u *Upstream) client(address, token, namespace string) (*api.Client, error) {
	transport := u.transport
	if transport == nil {
		var err error
		if transport, err = newTransport(u.config.CAFile); err != nil {
			return nil, err
		}
	}
	c, err := api.NewClient(&api.Config{
		Address: address,
		HttpClient: &http.Client{
			Transport:     guard{transport},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		MaxRetries:       0, // a request may be worth a signature: whether to repeat it is ours to say
		DisableRedirects: true,
	})
	if err != nil {
		return nil, fmt.Errorf("%w; unset the VAULT_ variables of the environment, which are not used", err)
	}
	// The library takes a token, a namespace and headers from the environment.
	c.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	c.SetToken(token)
	if namespace != "" {
		c.SetNamespace(namespace)
	}
	return c, nil
}

func newTransport(caFile string) (http.RoundTripper, error) {
	pem, err := inputfile.Read(caFile, identity.MaxCertificatePEM)
	if err != nil {
		return nil, err
	}
	certs, err := identity.ParsePEM(pem)
	if err != nil {
		return nil, fmt.Errorf("CA file %q: %w", caFile, err)
	}
	roots := x509.NewCertPool()
	for _, c := range certs {
		roots.AddCert(c)
	}
	return &http.Transport{
		// No Proxy: the token goes to the server that the URL names.
		DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		DisableKeepAlives:      true,
		DisableCompression:     true, // what is counted is what was sent
		MaxResponseHeaderBytes: 32 << 10,
	}, nil
}

// guard makes errors of what must not be read or followed, before the library does.
type guard struct{ http.RoundTripper }

func (g guard) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := g.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 3 {
		_ = resp.Body.Close()
		return nil, &redirectError{status: resp.StatusCode, location: resp.Header.Get("Location")}
	}
	resp.Body = &cappedBody{body: resp.Body, left: maxAnswer}
	return resp, nil
}

type redirectError struct {
	status   int
	location string
}

func (e *redirectError) Error() string {
	return fmt.Sprintf("it redirects (%d) to %.256q, and redirects are not followed", e.status, e.location)
}

var errTooLarge = fmt.Errorf("the answer has more than %d bytes", maxAnswer)

// cappedBody is a body that ends in an error after so many bytes.
type cappedBody struct {
	body io.ReadCloser
	left int
}

func (b *cappedBody) Read(p []byte) (int, error) {
	// One byte more than may be there tells a body that is too large from one that
	// is just as large.
	n, err := b.body.Read(p[:min(len(p), b.left+1)])
	if b.left -= n; b.left < 0 {
		return 0, errTooLarge
	}
	return n, err
}

func (b *cappedBody) Close() error { return b.body.Close() }

// Error is a request to Vault that failed.
type Error struct {
	State   State  // what that makes of Vault
	Doing   string // what was tried
	Address string
	Path    string
	Status  int    // HTTP status; 0 without an answer
	Reason  string // what went wrong
	Hint    string // what to do; may be empty
	Err     error  // why an answer is not believed; nil for other errors
	dial    bool   // nothing was sent: there was no connection
}

func (e *Error) Unwrap() error { return e.Err }

func (e *Error) Error() string {
	s := fmt.Sprintf("%s, Vault %s, path %q: %s", e.Doing, e.Address, e.Path, e.Reason)
	if e.Hint != "" {
		s += "; " + e.Hint
	}
	return s
}

// failure says what an error of the library means. The library's error is not
// wrapped: its text may hold what Vault was sent.
func (u *Upstream) failure(address string, r request, err error) *Error {
	e := &Error{Doing: r.doing, Address: address, Path: r.path}
	var (
		answer   *api.ResponseError
		redirect *redirectError
		op       *net.OpError
		timeout  net.Error
		untrue   *tls.CertificateVerificationError
		plain    tls.RecordHeaderError
		syntax   *json.SyntaxError
	)
	switch {
	case errors.As(err, &answer):
		e.Status = answer.StatusCode
		e.State, e.Hint = ofStatus(answer.StatusCode)
		e.Reason = fmt.Sprintf("it answers %d %s: %s", answer.StatusCode, http.StatusText(answer.StatusCode), strings.Join(answer.Errors, "; "))
	case errors.As(err, &redirect):
		e.Status, e.Reason = redirect.status, redirect.Error()
		if e.State = Refused; redirect.status == http.StatusTemporaryRedirect {
			e.State, e.Hint = Standby, "a standby server could not forward the request: add the server that it names to the addresses"
		}
	case errors.As(err, &untrue), errors.As(err, &plain):
		e.State, e.Hint = Refused, "the CA file must hold the authority of Vault's server certificate, and the certificate the address's name"
		e.Reason = err.Error()
	case errors.Is(err, errTooLarge), errors.As(err, &syntax):
		e.State, e.Reason = Refused, "the answer cannot be read: "+err.Error()
	case errors.As(err, &op) && op.Op == "dial":
		e.State, e.Reason, e.dial = Unreachable, err.Error(), true
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		e.State, e.Reason = Slow, fmt.Sprintf("no whole answer in %v", r.patience())
	default:
		e.State, e.Reason = Unreachable, err.Error()
	}
	e.Reason = redact(e.Reason, append(r.secrets, r.token))
	return e
}

func (r request) patience() time.Duration {
	if r.timeout == 0 {
		return healthTimeout
	}
	return r.timeout
}

// ofStatus is what an answer with this status makes of Vault. Whether a 503 or a 500
// is Vault's own is for its health to say; see [Upstream.explain].
func ofStatus(status int) (state State, hint string) {
	switch status {
	case http.StatusForbidden:
		return Forbidden, "the policy of the CA in Vault must allow it, as docs/vault.md says (setup.sh policy)"
	case http.StatusTooManyRequests:
		return Slow, "a rate limit quota of Vault is used up"
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return Unreachable, ""
	}
	return Refused, ""
}

// redact shortens what another program says and takes out of it what must not be
// printed.
func redact(text string, secrets []string) string {
	for _, s := range secrets {
		if s != "" {
			text = strings.ReplaceAll(text, s, "(secret)")
		}
	}
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}
