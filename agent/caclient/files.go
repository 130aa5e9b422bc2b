package caclient

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/meshca/meshca/identity/inputfile"
)

// maxToken bounds a token; the CA takes none that is longer.
const maxToken = 8 << 10

// TokenSource returns the token to show now. It is called for each attempt and
// must look anew each time: tokens are replaced while the process runs.
type TokenSource func() (string, error)

// TokenFile reads the token from a file, which holds it and nothing else. The
// path is opened at each call, so that a file swapped by symlink, as the
// kubelet does it, is seen at once.
func TokenFile(path string) TokenSource {
	return func() (string, error) {
		raw, err := inputfile.Read(path, maxToken)
		if err != nil {
			return "", fmt.Errorf("token file %q: %w", path, reason(err))
		}
		raw = bytes.TrimSpace(raw)
		if len(raw) == 0 {
			return "", fmt.Errorf("token file %q is empty", path)
		}
		if bytes.ContainsFunc(raw, func(r rune) bool { return r <= ' ' || r > '~' }) {
			// It would not fit into a header; and its bytes are not for the log.
			return "", fmt.Errorf("token file %q holds something else than one token (%d bytes, some of them not printable ASCII)", path, len(raw))
		}
		return string(raw), nil
	}
}

// reason drops the path from an error of package os: the caller names it.
func reason(err error) error {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

// bearer sends a token with one call, over TLS only.
type bearer string

// GetRequestMetadata implements [credentials.PerRPCCredentials].
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity implements [credentials.PerRPCCredentials].
func (bearer) RequireTransportSecurity() bool { return true }

// String keeps the token out of whatever prints the value.
func (bearer) String() string { return "bearer token" }

// GoString is for %#v; see String.
func (b bearer) GoString() string { return b.String() }

// describeToken says of a refused token what explains most refusals: when it
// ends and for whom it is. Nothing is verified, so it is for the log alone.
func describeToken(token string, now time.Time) string {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "what the token source gave is not a JWT"
	}
	var claims struct {
		Audience json.RawMessage `json:"aud"`
		Expires  float64         `json:"exp"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &claims) != nil {
		return "the token's claims cannot be read"
	}
	audience := strings.ReplaceAll(cut(string(claims.Audience)), "\n", " ")
	s := fmt.Sprintf("the token is for audience %q", audience)
	if claims.Expires > 0 && claims.Expires < 1<<38 {
		end := time.Unix(int64(claims.Expires), 0)
		if left := end.Sub(now).Round(time.Second); left > 0 {
			s += fmt.Sprintf(" and ends in %v", left)
		} else {
			s += fmt.Sprintf(" and ended %v ago (%s)", -left, end.UTC().Format(time.RFC3339))
		}
	}
	return s
}
