package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/kube/pods"
	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/test/kubetest"
)

// grant is a permission: a verb on a resource of a group.
type grant struct{ group, resource, verb string }

// grants are the permissions that the package docs of kube/pods and kube/review
// list, and all that the CA has here.
func grants() []grant {
	all := []grant{{"authentication.k8s.io", "tokenreviews", "create"}}
	for _, resource := range []string{"pods", "nodes", "serviceaccounts", "namespaces"} {
		for _, verb := range []string{"list", "watch", "get"} {
			all = append(all, grant{"", resource, verb})
		}
	}
	return all
}

// identify makes a ServiceAccount with these permissions and returns the way to the
// API server as it. Its role is at the path.
func identify(t *testing.T, c *kubetest.Cluster, name string, allowed []grant) (config *rest.Config, role string) {
	t.Helper()
	ctx := t.Context()
	must(t, c.CreateNamespace(ctx, "meshca-system"))
	_, err := c.CreateServiceAccount(ctx, "meshca-system", name)
	must(t, err)
	const rbac = "/apis/rbac.authorization.k8s.io/v1"
	_, err = c.Create(ctx, rbac+"/clusterroles", roleOf(name, allowed))
	must(t, err)
	_, err = c.Create(ctx, rbac+"/clusterrolebindings", map[string]any{
		"metadata": map[string]any{"name": name},
		"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
		"subjects": []any{map[string]any{"kind": "ServiceAccount", "namespace": "meshca-system", "name": name}},
	})
	must(t, err)
	bearer, err := c.Token(ctx, "meshca-system", name, kubetest.TokenRequest{Seconds: 3600})
	must(t, err)
	return &rest.Config{Host: c.URL(), BearerToken: bearer, TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile()}}, rbac + "/clusterroles/" + name
}

func roleOf(name string, allowed []grant) map[string]any {
	rules := []any{}
	for _, g := range allowed {
		rules = append(rules, map[string]any{"apiGroups": []string{g.group}, "resources": []string{g.resource}, "verbs": []string{g.verb}})
	}
	return map[string]any{"metadata": map[string]any{"name": name}, "rules": rules}
}

// follow runs a Pods until the test ends, or until stop.
func follow(t *testing.T, config pods.Config) (p *pods.Pods, stop func()) {
	t.Helper()
	p, err := pods.New(config)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = p.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-ended })
	t.Cleanup(stop)
	return p, stop
}

// within waits until is returns nil.
func within(t *testing.T, d time.Duration, what string, is func() error) {
	t.Helper()
	deadline := time.NewTimer(d)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := is()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("%s: not within %v; the last: %v", what, d, err)
		case <-tick.C:
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// rawToken asks the API server for a token of the workload's pod.
func (w workload) rawToken(t *testing.T, c *kubetest.Cluster) string {
	t.Helper()
	raw, err := c.Token(t.Context(), w.namespace, w.serviceAccount, kubetest.TokenRequest{
		Audiences: []string{"meshca"}, Seconds: 3600, PodName: w.pod, PodUID: w.podUID,
	})
	must(t, err)
	return raw
}

// claims are those of a fresh token of the workload's pod.
func (w workload) claims(t *testing.T, c *kubetest.Cluster) *token.Claims {
	t.Helper()
	claims, err := newVerifier(t, c).Verify(t.Context(), w.rawToken(t, c))
	must(t, err)
	return claims
}

// another makes one more pod of the workload's kind.
func (w workload) another(t *testing.T, c *kubetest.Cluster, name string) workload {
	t.Helper()
	uid, err := c.CreatePod(t.Context(), w.namespace, name, w.serviceAccount, w.node)
	must(t, err)
	w.pod, w.podUID = name, uid
	return w
}

// refused returns nil if err is a definite no for the reason.
func refused(err error, reason string) error {
	var unavailable *caller.UnavailableError
	if err == nil || errors.As(err, &unavailable) || !strings.Contains(err.Error(), reason) {
		return fmt.Errorf("%v; want a refusal with %q", err, reason)
	}
	return nil
}

// unknown returns nil if err says that it cannot be told, for the reason.
func unknown(err error, reason string) error {
	var unavailable *caller.UnavailableError
	if !errors.As(err, &unavailable) || !strings.Contains(err.Error(), reason) {
		return fmt.Errorf("%v; want an UnavailableError with %q", err, reason)
	}
	return nil
}

// wire is the network between the CA and the API server: it can be cut, and made to
// hold back what the API server says.
type wire struct {
	listener net.Listener
	target   string

	mu    sync.Mutex
	cut   bool
	delay time.Duration
	open  map[net.Conn]struct{}
	all   sync.WaitGroup
}

// between puts a wire into a way to the API server.
func between(t *testing.T, config *rest.Config) *wire {
	t.Helper()
	u, err := url.Parse(config.Host)
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	w := &wire{listener: l, target: u.Host, open: make(map[net.Conn]struct{})}
	config.Host = "https://" + l.Addr().String()
	w.all.Go(w.accept)
	t.Cleanup(func() {
		_ = l.Close()
		w.Cut(true)
		w.all.Wait()
	})
	return w
}

func (w *wire) accept() {
	for {
		client, err := w.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", w.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		w.mu.Lock()
		w.open[client], w.open[server] = struct{}{}, struct{}{}
		cut := w.cut
		w.mu.Unlock()
		if cut {
			w.Cut(true)
		}
		w.all.Go(func() { _, _ = io.Copy(server, client); w.close(client, server) })
		w.all.Go(func() { w.back(client, server); w.close(client, server) })
	}
}

func (w *wire) close(conns ...net.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
		delete(w.open, c)
	}
}

// back carries what the API server says, later if it should.
func (w *wire) back(client, server net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := server.Read(buf)
		if n > 0 {
			w.mu.Lock()
			delay := w.delay
			w.mu.Unlock()
			if delay > 0 {
				<-time.After(delay)
			}
			if _, err := client.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// Cut ends all connections, and with true new ones too.
func (w *wire) Cut(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = cut
	for c := range w.open {
		_ = c.Close()
	}
}

// Delay holds back all that the API server says from now on.
func (w *wire) Delay(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.delay = d
}

// atomicDuration is a clock that is so far ahead of the wall clock.
type atomicDuration struct{ d atomic.Int64 }

func (a *atomicDuration) set(d time.Duration) { a.d.Store(int64(d)) }

func (a *atomicDuration) now() time.Time { return time.Now().Add(time.Duration(a.d.Load())) }
