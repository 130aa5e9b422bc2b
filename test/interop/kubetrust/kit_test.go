package kubetrust

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

const deadline = 20 * time.Second

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// within waits for a condition and fails with what it said last.
func within(t testing.TB, limit time.Duration, what string, holds func() error) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	began, end := time.Now(), time.After(limit)
	for {
		err := holds()
		if err == nil {
			t.Logf("%s: after %v", what, time.Since(began).Round(time.Millisecond))
			return
		}
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("%s: %v", what, err)
		}
	}
}

func eventually(t testing.TB, what string, holds func() error) {
	t.Helper()
	within(t, deadline, what, holds)
}

// wire adds a token to requests and lets a test look at them, hold them and answer
// them.
type wire struct {
	token string
	next  http.RoundTripper
	see   func(*http.Request) *http.Response // nil sees nothing; a response is the answer
}

func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	if w.see != nil {
		if resp := w.see(r); resp != nil {
			return resp, nil
		}
	}
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+w.token)
	return w.next.RoundTrip(r)
}

func dial(t testing.TB, token string, see func(*http.Request) *http.Response) kubernetes.Interface {
	t.Helper()
	c := cluster.Get(t)
	if token == "" {
		token = c.AdminToken()
	}
	anchor, err := os.ReadFile(c.CAFile())
	check(t, err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(anchor)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	client, err := kubernetes.NewForConfigAndClient(&rest.Config{Host: c.URL(), QPS: -1}, &http.Client{Transport: &wire{token, transport, see}})
	check(t, err)
	return client
}

// source is a bundle that tests change.
type source struct {
	mu      sync.Mutex
	bundle  *identity.Bundle
	changed chan struct{}
}

func newSource(b *identity.Bundle) *source { return &source{bundle: b, changed: make(chan struct{})} }

func (s *source) Bundle() (*identity.Bundle, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundle, s.changed
}

func (s *source) set(b *identity.Bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bundle = b
	close(s.changed)
	s.changed = make(chan struct{})
}

// newBundle makes a bundle with a root of its own.
func newBundle(t testing.TB, domain string, sequence uint64) *identity.Bundle {
	t.Helper()
	td := identitytest.TrustDomain(t, domain)
	root, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: td})
	check(t, err)
	b, err := identity.NewBundle(td, identity.BundleConfig{Sequence: sequence, Authorities: []*x509.Certificate{root}})
	check(t, err)
	return b
}

// place is a namespace that is cleaned up, so that later distributors leave it alone.
func place(t testing.TB, name string, labels map[string]string) string {
	t.Helper()
	client := dial(t, "", nil)
	_, err := client.CoreV1().Namespaces().Create(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{})
	check(t, err)
	t.Cleanup(func() { clean(t, client, name) })
	return name
}

func clean(t testing.TB, client kubernetes.Interface, name string) {
	ctx := context.Background()
	label(t, client, name, `{"meshca.dev/trust-bundle":null,"meshca.dev/inject":null,"istio-injection":null}`)
	check(t, client.CoreV1().ConfigMaps(name).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
	err := client.CertificatesV1().ClusterTrustBundles().Delete(ctx, trust.TrustBundleName, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		t.Error(err)
	}
}

func label(t testing.TB, client kubernetes.Interface, name, labels string) {
	t.Helper()
	_, err := client.CoreV1().Namespaces().Patch(context.Background(), name, types.MergePatchType,
		[]byte(`{"metadata":{"labels":`+labels+`}}`), metav1.PatchOptions{})
	check(t, err)
}

type options struct {
	replica string
	token   string
	see     func(*http.Request) *http.Response
	istio   bool
	qps     float32
	now     func() time.Time
}

type running struct {
	*trust.Distributor
	logs *lines
	stop func()
}

// distribute runs a distributor with agents in a namespace until the test ends.
func distribute(t testing.TB, agents string, s *source, o options) *running {
	t.Helper()
	if o.replica == "" {
		o.replica = "meshca-0"
	}
	logs := new(lines)
	d, err := trust.New(trust.Config{
		Client: dial(t, o.token, o.see), Namespace: agents, Replica: o.replica, Bundle: s.Bundle,
		IstioCompatibility: o.istio, QPS: o.qps, Discovery: 50 * time.Millisecond, Now: o.now, Log: slog.New(slog.NewTextHandler(logs, nil)),
	})
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	r := &running{Distributor: d, logs: logs}
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

// problem waits until one is reported of an object.
func (r *running) problem(t testing.TB, condition string, words ...string) {
	t.Helper()
	eventually(t, "a problem of condition "+condition, func() error {
		for _, p := range r.Problems() {
			all := p.Condition == condition
			for _, w := range words {
				all = all && strings.Contains(p.Object+" "+p.Reason, w)
			}
			if all {
				return r.logs.says("condition=" + condition)
			}
		}
		return fmt.Errorf("problems %+v, want %q", r.Problems(), words)
	})
}

type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) says(words string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !strings.Contains(l.buf.String(), words) {
		return fmt.Errorf("the log does not say %q:\n%s", words, l.buf.String())
	}
	return nil
}

// holds is whether a namespace has exactly the bundle.
func holds(t testing.TB, client kubernetes.Interface, ns string, b *identity.Bundle) error {
	t.Helper()
	cm, err := client.CoreV1().ConfigMaps(ns).Get(context.Background(), trust.ConfigMapName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if cm.Data[trust.ConfigMapKey] != string(b.MarshalPEM()) || cm.Annotations["meshca.dev/bundle-sequence"] != strconv.FormatUint(b.Sequence(), 10) ||
		cm.Labels["app.kubernetes.io/managed-by"] != "meshca" {
		return fmt.Errorf("it has %v, %v and %q", cm.Labels, cm.Annotations, cm.Data)
	}
	return nil
}
