package bundle

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/meshca/meshca/identity"
)

// DefaultRefreshHint is how often clients are asked to look again. A new root has
// to be published three to five times as long before it is used
// (SPIFFE_Federation §6), which the acknowledging of a rotation outlasts.
const DefaultRefreshHint = 5 * time.Minute

// Source returns the bundle, nil if there is none yet, and a channel that is closed
// when there is another; [ca.Authority.Bundle] is one.
type Source func() (*identity.Bundle, <-chan struct{})

// Handler answers GET and HEAD on the path "/" with the newest bundle.
func Handler(source Source, refresh time.Duration) http.Handler {
	h := &handler{source: source, refresh: refresh}
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", h) // HEAD too; other methods are answered with 405, other paths with 404
	return mux
}

type handler struct {
	source  Source
	refresh time.Duration
	last    atomic.Pointer[document]
}

// document is a bundle as it is sent. It is made once for each bundle.
type document struct {
	of   *identity.Bundle
	body []byte
	etag string
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	doc, err := h.document()
	if err != nil {
		w.Header().Set("Retry-After", "5")
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("ETag", doc.etag)
	// A cache on the way must not answer with an older one than we would.
	header.Set("Cache-Control", "no-cache")
	header.Set("X-Content-Type-Options", "nosniff")
	if matches(r.Header.Values("If-None-Match"), doc.etag) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	header.Set("Content-Length", strconv.Itoa(len(doc.body)))
	_, _ = w.Write(doc.body) // whoever went away does not want it
}

// matches reports whether a client has the document (RFC 9110 §13.1.2).
func matches(values []string, etag string) bool {
	for _, v := range values {
		for candidate := range strings.SplitSeq(v, ",") {
			if c := strings.TrimPrefix(strings.TrimSpace(candidate), "W/"); c == etag || c == "*" {
				return true
			}
		}
	}
	return false
}

func (h *handler) document() (*document, error) {
	b, _ := h.source()
	// An empty one would have every client take all of the domain's SVIDs for
	// untrusted (SPIFFE_Trust_Domain_and_Bundle §4.1.3).
	if b == nil || len(b.Authorities()) == 0 {
		return nil, fmt.Errorf("there is no bundle yet")
	}
	if d := h.last.Load(); d != nil && d.of == b {
		return d, nil
	}
	published, err := identity.NewBundle(b.TrustDomain(), identity.BundleConfig{
		Sequence: b.Sequence(), RefreshHint: h.refresh, Authorities: b.Authorities(),
	})
	if err != nil {
		return nil, err
	}
	body, err := published.MarshalJSON()
	if err != nil {
		return nil, err
	}
	if len(body) > identity.MaxBundleBytes {
		return nil, fmt.Errorf("the bundle has %d bytes, more than %d", len(body), identity.MaxBundleBytes)
	}
	sum := sha256.Sum256(body)
	d := &document{of: b, body: body, etag: `"` + hex.EncodeToString(sum[:16]) + `"`}
	h.last.Store(d)
	return d, nil
}
