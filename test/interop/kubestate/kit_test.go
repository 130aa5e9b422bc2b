package kubestate

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// deadline is when a condition that must come is given up.
const deadline = 20 * time.Second

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for a condition and fails with what it said last.
func eventually(t testing.TB, what string, holds func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.After(deadline)
	for {
		err := holds()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// wire is a replica's way to the API server, with faults.
type wire struct {
	token string
	next  http.RoundTripper
	// judge decides about each request before it is sent; nil passes all.
	judge func(*request) fault
	mu    sync.Mutex
	log   []string
}

// request is one request as faults are told about it.
type request struct {
	nth  int // counted from 1
	verb string
	kind string // secrets, configmaps
	name string
}

func (r *request) String() string { return fmt.Sprintf("%d %s %s %s", r.nth, r.verb, r.kind, r.name) }

// fault is what happens to a request.
type fault int

const (
	pass   fault = iota
	before       // an error, and nothing was executed
	after        // executed, and the answer is lost
)

var errCut = errors.New("connection reset by the test")

func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	kind, name := path.Split(strings.TrimPrefix(r.URL.Path, "/api/v1/namespaces/"))
	if parts := strings.Split(strings.Trim(kind, "/"), "/"); len(parts) == 2 {
		kind = parts[1]
	} else {
		kind, name = name, ""
	}
	w.mu.Lock()
	req := &request{nth: len(w.log) + 1, verb: r.Method, kind: kind, name: name}
	w.log = append(w.log, req.String())
	w.mu.Unlock()
	f := pass
	if w.judge != nil {
		f = w.judge(req)
	}
	if f == before {
		return nil, errCut
	}
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+w.token)
	resp, err := w.next.RoundTrip(r)
	if f == after && err == nil {
		resp.Body.Close()
		return nil, errCut
	}
	return resp, err
}

func (w *wire) requests() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.log...)
}

// dial returns a client that speaks through a wire.
func dial(t testing.TB, token string, judge func(*request) fault) (typedcorev1.CoreV1Interface, *wire) {
	t.Helper()
	client, w := dialAll(t, token, judge)
	return client.CoreV1(), w
}

// dialAll is the same for all kinds.
func dialAll(t testing.TB, token string, judge func(*request) fault) (kubernetes.Interface, *wire) {
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
	w := &wire{token: token, next: transport, judge: judge}
	client, err := kubernetes.NewForConfigAndClient(&rest.Config{Host: c.URL(), QPS: -1}, &http.Client{Transport: w})
	check(t, err)
	return client, w
}

func admin(t testing.TB) typedcorev1.CoreV1Interface {
	client, _ := dial(t, "", nil)
	return client
}

var namespaces atomic.Int32

// newNamespace makes a namespace for one test.
func newNamespace(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("state-%d", namespaces.Add(1))
	check(t, cluster.Get(t).CreateNamespace(context.Background(), name))
	return name
}

// replica is a CA's store that runs.
type replica struct {
	*state.Store
	wire    *wire
	logs    *lines
	metrics *prometheus.Registry
	stop    func()
}

// metric is the value of a metric with one label's value.
func (r *replica) metric(t testing.TB, name, label string) float64 {
	t.Helper()
	families, err := r.metrics.Gather()
	check(t, err)
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == name && m.Label[0].GetValue() == label {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("there is no metric %s of %q", name, label)
	return 0
}

// options of a replica.
type options struct {
	domain string
	token  string
	judge  func(*request) fault
	now    func() time.Time
	agents string // their namespace; nobody looks for anchors if it is not given
}

func start(t testing.TB, namespace string, o options) *replica {
	t.Helper()
	if o.domain == "" {
		o.domain = "cluster.local"
	}
	client, w := dialAll(t, o.token, o.judge)
	logs, metrics := new(lines), prometheus.NewRegistry()
	td := identitytest.TrustDomain(t, o.domain)
	var anchors func(context.Context) ([]state.Anchor, error)
	if o.agents != "" {
		anchors = func(ctx context.Context) (all []state.Anchor, err error) {
			found, err := trust.Anchors(ctx, client, o.agents, td)
			for _, a := range found {
				all = append(all, state.Anchor(a))
			}
			return all, err
		}
	}
	s, err := state.New(state.Config{
		Client: client.CoreV1(), Namespace: namespace, TrustDomain: td, Anchors: anchors,
		Interval: 50 * time.Millisecond, Now: o.now, Log: slog.New(slog.NewTextHandler(logs, nil)), Metrics: metrics,
	})
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	r := &replica{Store: s, wire: w, logs: logs, metrics: metrics}
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

// signs has the replica sign an intermediate and returns the answer.
func (r *replica) signs(t testing.TB) (*ca.Signed, error) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	check(t, err)
	csr, err := x509.ParseCertificateRequest(der)
	check(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	st, _, ok := r.State()
	td := identitytest.TrustDomain(t, "cluster.local")
	if ok {
		td = identitytest.TrustDomain(t, st.TrustDomain)
	}
	return r.SignIntermediate(ctx, ca.IntermediateRequest{CSR: csr, TrustDomain: td, Lifetime: time.Hour})
}

// root waits until the replica signs and returns the root that it signs with.
func (r *replica) root(t testing.TB) *x509.Certificate {
	t.Helper()
	var root *x509.Certificate
	eventually(t, "signing", func() error {
		s, err := r.signs(t)
		if err != nil {
			return err
		}
		for _, c := range s.Roots {
			if s.Chain[0].CheckSignatureFrom(c) == nil {
				root = c
			}
		}
		return nil
	})
	return root
}

// refuses waits until the replica refuses with an error of target's type.
func (r *replica) refuses(t testing.TB, target any, words ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("a refusal of type %T", target), func() error {
		_, err := r.signs(t)
		if err == nil {
			return errors.New("it signs")
		}
		if !errors.As(err, target) {
			return err
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				return fmt.Errorf("%w (without %q)", err, w)
			}
		}
		return nil
	})
}

// lines is a log that can be asked.
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

// secrets are the Secrets of ours in a namespace.
func secrets(t testing.TB, namespace string) []corev1.Secret {
	t.Helper()
	list, err := admin(t).Secrets(namespace).List(context.Background(), metav1.ListOptions{})
	check(t, err)
	var ours []corev1.Secret
	for _, s := range list.Items {
		if s.Type == state.SecretType {
			ours = append(ours, s)
		}
	}
	return ours
}

// onlyRoot demands that there is one root in a namespace and returns it.
func onlyRoot(t testing.TB, namespace string) *x509.Certificate {
	t.Helper()
	all := secrets(t, namespace)
	if len(all) != 1 {
		t.Fatalf("%d roots in %s", len(all), namespace)
	}
	if all[0].Immutable == nil || !*all[0].Immutable {
		t.Error("the Secret can be changed")
	}
	certs, err := identity.ParsePEM(all[0].Data["root.pem"])
	check(t, err)
	return certs[0]
}

func text(t testing.TB, namespace, name, key string) string {
	t.Helper()
	cm, err := admin(t).ConfigMaps(namespace).Get(context.Background(), name, metav1.GetOptions{})
	check(t, err)
	return cm.Data[key]
}

func marker(t testing.TB, namespace string) string {
	return text(t, namespace, state.MarkerName, "roots.json")
}

func shared(t testing.TB, namespace string) string {
	return text(t, namespace, state.StateName, "state.json")
}

type certificate = x509.Certificate

func identityPEM(c *x509.Certificate) []byte { return identity.EncodePEM(c) }
