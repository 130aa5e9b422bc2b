package kubetrust

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/trust"
)

// refusal answers as an API server that does not want to.
func refusal(r *http.Request, code int, reason metav1.StatusReason) *http.Response {
	return &http.Response{
		StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}}, Request: r,
		Body: io.NopCloser(strings.NewReader(fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d}`, reason, code))),
	}
}

// A source that may not be read keeps nothing from the agents, is reported for as
// long as that lasts, and is followed when it may be.
func TestF32_SourceThatCannotBeFollowedStopsNoOther(t *testing.T) {
	client := dial(t, "", nil)
	for resource, path := range map[string]string{
		"clustertrustbundles": "/apis/certificates.k8s.io/v1/clustertrustbundles",
		"namespaces":          "/api/v1/namespaces",
	} {
		t.Run(resource, func(t *testing.T) {
			agents := place(t, "blind-"+resource, nil)
			other := place(t, "blind-other-"+resource, map[string]string{"meshca.dev/inject": "enabled"})
			var allowed atomic.Bool
			var passed atomic.Int64 // of the distributor's clock
			b := newBundle(t, "cluster.local", 1)
			d := distribute(t, agents, newSource(b), options{
				now: func() time.Time { return time.Now().Add(time.Duration(passed.Load())) },
				see: func(r *http.Request) *http.Response {
					if r.Method == http.MethodGet && r.URL.Path == path && !allowed.Load() {
						return refusal(r, http.StatusForbidden, metav1.StatusReasonForbidden)
					}
					return nil
				},
			})
			eventually(t, "the agents' anchor", func() error { return holds(t, client, agents, b) })
			d.problem(t, "failing", resource)
			passed.Store(int64(time.Hour))
			if len(d.Problems()) == 0 {
				t.Error("a problem that is there is forgotten")
			}
			allowed.Store(true)
			eventually(t, "no problem", func() error {
				if p := d.Problems(); len(p) > 0 {
					return fmt.Errorf("%+v", p)
				}
				_, err := client.CertificatesV1().ClusterTrustBundles().Get(t.Context(), trust.TrustBundleName, metav1.GetOptions{})
				return err
			})
			eventually(t, "the other namespace", func() error { return holds(t, client, other, b) })
		})
	}
}

// An upgrade of the API server brings ClusterTrustBundles.
func TestClusterTrustBundlesThatAreServedLater(t *testing.T) {
	client := dial(t, "", nil)
	agents := place(t, "served-later", nil)
	b := newBundle(t, "cluster.local", 1)
	var served, broken atomic.Bool
	broken.Store(true)
	d := distribute(t, agents, newSource(b), options{see: func(r *http.Request) *http.Response {
		switch {
		case served.Load() || !strings.HasPrefix(r.URL.Path, "/apis/certificates.k8s.io/v1"):
			return nil
		case broken.Load():
			return refusal(r, http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable)
		}
		return refusal(r, http.StatusNotFound, metav1.StatusReasonNotFound)
	}})
	eventually(t, "the ConfigMap", func() error { return holds(t, client, agents, b) })
	d.problem(t, "failing", "discovery of certificates.k8s.io/v1")
	broken.Store(false)
	eventually(t, "the problem is gone", func() error {
		if p := d.Problems(); len(p) > 0 {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	served.Store(true)
	eventually(t, "the ClusterTrustBundle", func() error {
		_, err := client.CertificatesV1().ClusterTrustBundles().Get(t.Context(), trust.TrustBundleName, metav1.GetOptions{})
		return err
	})
}
