package kubereport

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/census"
	"github.com/meshca/meshca/ca/kube/report"
	"github.com/meshca/meshca/test/kubetest"
)

// deadline is when a condition that must come is given up.
const deadline = time.Minute

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

func client(t testing.TB, token string) kubernetes.Interface {
	t.Helper()
	c := cluster.Get(t)
	if token == "" {
		token = c.AdminToken()
	}
	config := &rest.Config{Host: c.URL(), BearerToken: token, QPS: -1, TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile()}}
	http, err := rest.HTTPClientFor(config)
	check(t, err)
	t.Cleanup(http.CloseIdleConnections)
	k, err := kubernetes.NewForConfigAndClient(config, http)
	check(t, err)
	return k
}

var namespaces atomic.Int32

func newNamespace(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("report-%d", namespaces.Add(1))
	check(t, cluster.Get(t).CreateNamespace(context.Background(), name))
	return name
}

// replica reports about an authority of its own.
type replica struct {
	census *census.Census
	logs   *lines
	stop   func()
}

type options struct {
	token string
	every time.Duration
	now   func() time.Time
	pod   func(uid string) (report.Pod, bool)
}

func start(t testing.TB, ns, name string, o options) *replica {
	t.Helper()
	k := catest.New(t)
	if o.every == 0 {
		o.every = 50 * time.Millisecond
	}
	if o.pod == nil {
		o.pod = func(uid string) (report.Pod, bool) {
			return report.Pod{Namespace: "shop", Name: uid, Alive: true}, true
		}
	}
	r := &replica{census: census.New(), logs: new(lines)}
	p, err := report.New(report.Config{
		Client: client(t, o.token).CoreV1().ConfigMaps(ns), Replica: name, Now: o.now, Intervals: o.every,
		Log:   slog.New(slog.NewTextHandler(r.logs, nil)),
		About: report.Document{TrustDomain: "cluster.local", RootNamespace: ns, Agents: ns},
		Sources: report.Sources{
			Authority: k.Authority, Ready: k.Authority.Ready, Census: r.census, Pod: o.pod,
			Policy: func() (uint64, string) { return 41, "" }, Problems: func() []report.Problem { return nil },
		},
	})
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

// replicas are the names of those whose documents count.
func replicas(t testing.TB, ns string, now func() time.Time) (fresh, stale []string) {
	t.Helper()
	all, err := report.Read(context.Background(), client(t, "").CoreV1().ConfigMaps(ns), now)
	check(t, err)
	for _, d := range all.Fresh {
		fresh = append(fresh, d.Replica)
	}
	for _, s := range all.Stale {
		stale = append(stale, s.Replica)
	}
	return fresh, stale
}

// bind makes a ServiceAccount with the rules in a namespace and returns its token.
func bind(t *testing.T, ns string, rules []rbacv1.PolicyRule) string {
	t.Helper()
	ctx, c, k := context.Background(), cluster.Get(t), client(t, "")
	_, err := c.CreateServiceAccount(ctx, ns, "ca")
	check(t, err)
	_, err = k.RbacV1().Roles(ns).Create(ctx, &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: "ca"}, Rules: rules}, metav1.CreateOptions{})
	check(t, err)
	_, err = k.RbacV1().RoleBindings(ns).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "ca"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "ca"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "ca", Namespace: ns}},
	}, metav1.CreateOptions{})
	check(t, err)
	token, err := c.Token(ctx, ns, "ca", kubetest.TokenRequest{})
	check(t, err)
	return token
}

type lines struct {
	mu  sync.Mutex
	all []byte
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, p...)
	return len(p), nil
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.all)
}

// tokenOfAPIServer asks for a token as every client of the API server has.
var tokenOfAPIServer = kubetest.TokenRequest{}
