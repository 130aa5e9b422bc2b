package jwks

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/inputfile"
)

// Source is where a JWK Set is read: a [File] or an [HTTPS].
type Source interface {
	// Load returns the document as it is now. It is called by one goroutine at a
	// time and must return when ctx ends.
	Load(ctx context.Context) ([]byte, error)
	// interval is how often Run loads it.
	interval() time.Duration
	// String names the source in log lines.
	String() string
}

const (
	// A file is polled by its content: watching alone loses changes.
	fileInterval = 10 * time.Second
	httpInterval = 5 * time.Minute

	maxTokenFile = 16 << 10
)

// File is a JWK Set in a file, which may be replaced at any time.
type File string

// Load reads the file.
func (f File) Load(context.Context) ([]byte, error) { return inputfile.Read(string(f), maxDocument) }

func (f File) interval() time.Duration { return fileInterval }

// String returns the path.
func (f File) String() string { return string(f) }

// HTTPS is a JWK Set at an https URL. Its files are read again for each
// request, so that they can be replaced at any time.
type HTTPS struct {
	// URL of the document, https only. A redirect is an error.
	URL string
	// CAFile holds, in PEM, the only CAs that the server's certificate may chain
	// to. The system's are not consulted.
	CAFile string
	// TokenFile, if any, holds the bearer token to show to this URL and to no
	// other.
	TokenFile string
}

// APIServer returns the source for the keys of a Kubernetes API server, from the
// server's base URL. The API server gives its keys to authenticated callers: the
// token is the CA's own, projected for the API server's audience, and it needs
// ClusterRole system:service-account-issuer-discovery.
func APIServer(base, caFile, tokenFile string) HTTPS {
	return HTTPS{URL: strings.TrimSuffix(base, "/") + "/openid/v1/jwks", CAFile: caFile, TokenFile: tokenFile}
}

func (h HTTPS) validate() error {
	u, err := url.Parse(h.URL)
	switch {
	case err != nil:
		return fmt.Errorf("key set URL: %w", err)
	case u.Scheme != "https" || u.Host == "":
		return fmt.Errorf("key set URL %q: only https is used", h.URL)
	case u.User != nil || u.Fragment != "":
		return errors.New("key set URL: it holds a user or a fragment; give the bare URL")
	case h.CAFile == "":
		return fmt.Errorf("key set URL %q: a CA file is needed; the system's CAs are not consulted", h.URL)
	}
	return nil
}

// Load fetches the document.
func (h HTTPS) Load(ctx context.Context) ([]byte, error) {
	if err := h.validate(); err != nil {
		return nil, err
	}
	client, err := h.client()
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.URL, nil)
	if err != nil {
		return nil, fmt.Errorf("fetching keys from %q: %w", h.URL, err)
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	if h.TokenFile != "" {
		bearer, err := readToken(h.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("fetching keys from %q: %w", h.URL, err)
		}
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetching keys: %w", err) // *url.Error names the URL
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode/100 == 3:
		return nil, fmt.Errorf("fetching keys from %q: it redirects to %.256q; redirects are not followed, configure the final URL", h.URL, resp.Header.Get("Location"))
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("fetching keys from %q: it answers %.80q%s", h.URL, resp.Status, hint(resp.StatusCode))
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err == nil {
		// A server that ends its answer because we hang up may be read to that end
		// before our side of the connection is closed: half a document, whole.
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("fetching keys from %q: reading the answer: %w", h.URL, err)
	}
	if len(body) > maxDocument {
		return nil, fmt.Errorf("fetching keys from %q: the answer has more than %d bytes", h.URL, maxDocument)
	}
	return body, nil
}

func hint(status int) string {
	switch status {
	case http.StatusUnauthorized:
		return "; the token file's token is expired or for another audience"
	case http.StatusForbidden:
		return "; bind the ClusterRole system:service-account-issuer-discovery to the CA's service account"
	}
	return ""
}

// client makes a client for one request. Requests are rare, so a connection is
// not kept: the CA file counts as it is now.
func (h HTTPS) client() (*http.Client, error) {
	pem, err := inputfile.Read(h.CAFile, identity.MaxCertificatePEM)
	if err != nil {
		return nil, fmt.Errorf("fetching keys from %q: %w", h.URL, err)
	}
	certs, err := identity.ParsePEM(pem)
	if err != nil {
		return nil, fmt.Errorf("fetching keys from %q: CA file %q: %w", h.URL, h.CAFile, err)
	}
	roots := x509.NewCertPool()
	for _, c := range certs {
		roots.AddCert(c)
	}
	return &http.Client{
		Transport: &http.Transport{
			// No Proxy: the token goes to the server that the URL names.
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			DisableKeepAlives:      true,
			DisableCompression:     true, // what is counted is what was sent
			MaxResponseHeaderBytes: 32 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// readToken reads a bearer token from a file.
func readToken(path string) (string, error) {
	b, err := inputfile.Read(path, maxTokenFile)
	if err != nil {
		return "", err
	}
	bearer := strings.TrimSpace(string(b))
	if bearer == "" {
		return "", fmt.Errorf("token file %q is empty", path)
	}
	for i := range len(bearer) {
		if bearer[i] <= ' ' || bearer[i] > '~' {
			return "", fmt.Errorf("token file %q holds more than one token, or none", path)
		}
	}
	return bearer, nil
}

func (h HTTPS) interval() time.Duration { return httpInterval }

// String returns the URL.
func (h HTTPS) String() string { return h.URL }
