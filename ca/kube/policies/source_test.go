package policies

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/ca/kube/watches"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
)

const root = "meshca-system"

// labels are those of pods that a test makes up. What a watch of pods does is
// tested with a real API server, in test/interop/kubepolicy.
type labels struct {
	mu     sync.Mutex
	all    map[string]map[string]string
	notify func(string)
}

func (l *labels) Labels(uid string) (string, map[string]string, uint64, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	found, ok := l.all[uid]
	return "shop", found, 7, ok
}

func (l *labels) Notify(f func(string)) { l.notify = f }

func (l *labels) set(uid string, to map[string]string) {
	l.mu.Lock()
	l.all[uid] = to
	l.mu.Unlock()
	l.notify(uid)
}

// apiServer answers what a source asks beside its watch: there is a definition, and
// no record. What it says under trouble is tested with a real one.
func apiServer(t testing.TB) dynamic.Interface {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if strings.HasSuffix(r.URL.Path, "/"+definition.Name) {
			fmt.Fprintf(w, `{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": %q, "uid": "1"}}`, definition.Name)
			return
		}
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}`)
	}))
	t.Cleanup(s.Close)
	c, err := dynamic.NewForConfigAndClient(&rest.Config{Host: s.URL, QPS: -1}, s.Client())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newSource(t testing.TB) (*Source, *labels) {
	t.Helper()
	l := &labels{all: make(map[string]map[string]string)}
	s, err := New(Config{
		Client: apiServer(t), Pods: l, RootNamespace: root, Namespace: root,
		Now: time.Now, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, l
}

// now puts in force what has come in, without waiting for more.
func (s *Source) nowLook(t testing.TB) {
	t.Helper()
	s.since, s.judged = time.Time{}, time.Time{}
	s.look(t.Context())
}

func object(namespace, name string, version int, spec string) *unstructured.Unstructured {
	o := new(unstructured.Unstructured)
	text := fmt.Sprintf(`{"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"namespace": %q, "name": %q, "uid": %q, "resourceVersion": "%d", "creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": %s}`,
		namespace, name, namespace+name, version, spec)
	if err := json.Unmarshal([]byte(text), &o.Object); err != nil {
		panic(err)
	}
	return o
}

func mode(m string) string { return fmt.Sprintf(`{"mtls": {"mode": %q}}`, m) }

func cart(t testing.TB) identity.ID {
	t.Helper()
	id, err := identity.ParseID("spiffe://cluster.local/ns/shop/sa/cart")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// The version is exactly what the watch has come to. Only changes are pushed, also
// ones that were taken back before anybody looked: who was not told of their number
// could take what was between for news.
func TestT10_F69_VersionsAreExact(t *testing.T) {
	s, l := newSource(t)
	l.all["pod"] = nil
	id := cart(t)
	if p, _ := s.Policy(id, "pod"); p != nil {
		t.Errorf("before anything was asked: %+v", p)
	}
	must(t, s.all.Replace([]any{object("shop", "default", 5, mode("STRICT"))}, "10"))
	s.nowLook(t)
	for _, tt := range []struct {
		name    string
		event   func() error
		version uint64
		pushed  bool
		mode    policy.Mode
	}{
		{"a bookmark", func() error { return s.all.Bookmark("20") }, 20, false, policy.Strict},
		{"an older bookmark", func() error { return s.all.Bookmark("15") }, 20, false, policy.Strict},
		{"an object that changed in nothing that counts", func() error { return s.all.Update(object("shop", "default", 21, mode("STRICT"))) }, 21, false, policy.Strict},
		{"a change", func() error { return s.all.Update(object("shop", "default", 22, mode("DISABLE"))) }, 22, true, policy.Disable},
		{"a change elsewhere", func() error { return s.all.Add(object("bank", "default", 23, mode("DISABLE"))) }, 23, false, policy.Disable},
		{"a change that is taken back", func() error {
			must(t, s.all.Update(object("shop", "default", 24, mode("STRICT"))))
			return s.all.Update(object("shop", "default", 25, mode("DISABLE")))
		}, 25, true, policy.Disable},
		{"a deletion", func() error { return s.all.Delete(object("shop", "default", 26, mode("DISABLE"))) }, 26, true, policy.Permissive},
		{"a deletion of what is not there", func() error { return s.all.Delete(object("shop", "default", 27, mode("DISABLE"))) }, 27, false, policy.Permissive},
		{"a list of the same", func() error { return s.all.Replace([]any{object("bank", "default", 23, mode("DISABLE"))}, "30") }, 30, true, policy.Permissive},
		{"a policy of the mesh", func() error { return s.all.Add(object(root, "default", 31, mode("STRICT"))) }, 31, true, policy.Strict},
	} {
		_, changed := s.Policy(id, "pod")
		must(t, tt.event())
		s.nowLook(t)
		p, _ := s.Policy(id, "pod")
		if p.Version != tt.version || p.Mode != tt.mode || isClosed(changed) != tt.pushed {
			t.Errorf("%s: version %d, %v, pushed %v; want %d, %v, %v", tt.name, p.Version, p.Mode, isClosed(changed), tt.version, tt.mode, tt.pushed)
		}
	}
	if s.all.count != 2 {
		t.Errorf("%d policies are counted", s.all.count)
	}
}

// How long the watch was silent is seen, whatever else was told.
func TestF25_SilenceIsSeen(t *testing.T) {
	s, _ := newSource(t)
	now := time.Now()
	s.all.now = func() time.Time { return now }
	if s.all.age() != 0 {
		t.Errorf("before anything was told: %v", s.all.age())
	}
	for _, event := range []struct { // a watch begins with a list
		name string
		tell func() error
	}{
		{"a list", func() error { return s.all.Replace(nil, "1") }},
		{"a change", func() error { return s.all.Add(object("shop", "default", 2, mode("STRICT"))) }},
		{"a deletion", func() error { return s.all.Delete(object("shop", "default", 3, mode("STRICT"))) }},
		{"a bookmark", func() error { return s.all.Bookmark("4") }},
	} {
		name := event.name
		must(t, event.tell())
		now = now.Add(90 * time.Second)
		if s.all.age() != 90*time.Second {
			t.Errorf("after %s: %v", name, s.all.age())
		}
		if err := s.Degraded(); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
		now = now.Add(longestSilence)
		if s.Degraded() == nil {
			t.Errorf("long after %s all is said to be well", name)
		}
	}
}

// Changes that come together are put in force together, 100 ms after the last.
func TestChangesAreGathered(t *testing.T) {
	s, _ := newSource(t)
	must(t, s.all.Replace(nil, "10"))
	s.nowLook(t)
	must(t, s.all.Add(object("shop", "default", 11, mode("STRICT"))))
	if again := s.look(t.Context()); again <= 0 || again > together || s.version() != 10 {
		t.Errorf("at once: version %d, and again after %v", s.version(), again)
	}
	must(t, s.all.Bookmark("12"))
	s.since = s.since.Add(-together)
	s.look(t.Context())
	if s.version() != 12 {
		t.Errorf("version %d", s.version())
	}
}

// An API server whose numbers have fallen was restored from a backup. What was in
// force stays until they have risen above it.
func TestT10_F69_NumbersNeverFall(t *testing.T) {
	s, l := newSource(t)
	l.all["pod"] = nil
	must(t, s.all.Replace([]any{object("shop", "default", 900, mode("STRICT"))}, "1000"))
	s.nowLook(t)
	must(t, s.all.Replace([]any{object("shop", "default", 400, mode("DISABLE"))}, "500"))
	s.nowLook(t)
	must(t, s.all.Bookmark("999"))
	s.nowLook(t)
	if p, _ := s.Policy(cart(t), "pod"); p.Version != 1000 || p.Mode != policy.Strict || !strings.Contains(s.said, "restored from a backup") {
		t.Errorf("version %d, %v; %s", p.Version, p.Mode, s.said)
	}
	must(t, s.all.Bookmark("1001"))
	s.nowLook(t)
	if p, _ := s.Policy(cart(t), "pod"); p.Version != 1001 || p.Mode != policy.Disable {
		t.Errorf("version %d, %v", p.Version, p.Mode)
	}
	if err := s.all.Bookmark("abc"); err == nil {
		t.Error("a version that is no number was taken")
	}
}

// A pod's labels reach whoever waits for that pod, and nobody else; what is kept for
// those who wait is bounded.
func TestLabelsReachOnePod(t *testing.T) {
	s, l := newSource(t)
	must(t, s.all.Replace([]any{object("shop", "cart", 5, `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "STRICT"}}`)}, "10"))
	s.nowLook(t)
	l.all["a"], l.all["b"] = map[string]string{"app": "cart"}, map[string]string{"app": "cart"}
	_, a := s.Policy(cart(t), "a")
	_, again := s.Policy(cart(t), "a")
	_, b := s.Policy(cart(t), "b")
	l.set("a", map[string]string{"app": "pay"})
	if !isClosed(a) || !isClosed(again) || isClosed(b) {
		t.Errorf("told: %v, %v, and the other pod %v", isClosed(a), isClosed(again), isClosed(b))
	}
	p, _ := s.Policy(cart(t), "a")
	if p.Mode != policy.Permissive || p.WorkloadVersion != 7 {
		t.Errorf("%+v", p)
	}
	for i := range maxWaiting + 10 {
		s.Policy(cart(t), fmt.Sprint(i))
	}
	if len(s.waiting) > maxWaiting || !isClosed(b) {
		t.Errorf("%d are waited for; those who were forgotten were told: %v", len(s.waiting), isClosed(b))
	}
}

// Many namespaces at once are compiled with all others, few one by one; both come to
// the same.
func TestManyNamespacesAtOnce(t *testing.T) {
	s, _ := newSource(t)
	must(t, s.all.Replace([]any{object("shop", "default", 5, mode("DISABLE"))}, "10"))
	s.nowLook(t)
	version := 10
	for _, n := range []int{1, fewNamespaces, fewNamespaces + 1} {
		for i := range n {
			version++
			must(t, s.all.Update(object(fmt.Sprint("ns-", i), "default", version, mode([]string{"STRICT", "DISABLE"}[n%2]))))
		}
		s.nowLook(t)
		for i := range n {
			want := []policy.Mode{policy.Strict, policy.Disable}[n%2]
			if got := s.now.set.Resolve(fmt.Sprint("ns-", i), nil); got.Mode != want {
				t.Errorf("of %d, namespace %d: %v, want %v", n, i, got.Mode, want)
			}
		}
		if got := s.now.set.Resolve("shop", nil); got.Mode != policy.Disable {
			t.Errorf("after %d: %v", n, got.Mode)
		}
	}
}

// An object that the API server let in, and that is not understood whole, is STRICT
// for what it selects, as is a mode that is not known.
func TestT10_V22_Decode(t *testing.T) {
	selects := map[string]string{"app": "cart"}
	for spec, want := range map[string]policy.Policy{
		`{}`:                     {Mode: policy.Unset},
		`null`:                   {Mode: policy.Unset},
		mode("STRICT"):           {Mode: policy.Strict},
		mode("strict"):           {Mode: policy.Unknown},
		`{"mtls": {"mode": 3}}`:  {Mode: policy.Unknown},
		`{"mtls": null}`:         {Mode: policy.Unset},
		`[]`:                     {Mode: policy.Unknown},
		`{"mtls": {}, "new": 1}`: {Mode: policy.Unknown},
		`{"selector": {"matchLabels": 1}, "mtls": {"mode": "DISABLE"}}`: {Mode: policy.Unknown},
		`{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}, "portLevelMtls": {"08080": {"mode": "STRICT"}, "80": null}}`: {
			Selector: selects, Mode: policy.Disable, Ports: map[uint16]policy.Mode{8080: policy.Strict, 80: policy.Unset}},
		`{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}, "portLevelMtls": {"http": {}}}`: {Selector: selects, Mode: policy.Unknown},
		`{"selector": {"matchLabels": {"app": "cart"}}, "portLevelMtls": {"80": {"mode": "NEW"}}}`:                   {Selector: selects, Mode: policy.Unset, Ports: map[uint16]policy.Mode{80: policy.Unknown}},
	} {
		got := decode(object("shop", "cart", 5, spec))
		if got.Mode != want.Mode || !maps.Equal(got.Selector, want.Selector) || !maps.Equal(got.Ports, want.Ports) ||
			got.Ref != (policy.Ref{Namespace: "shop", Name: "cart"}) || got.Created.Year() != 2026 {
			t.Errorf("%s: %+v, want %+v", spec, got.Policy.Policy, want)
		}
	}
}

// A pod that has not been heard of, or is in another namespace than its identity, may
// be one that a policy selects.
func TestT10_LabelsThatAreNotKnown(t *testing.T) {
	s, l := newSource(t)
	must(t, s.all.Replace([]any{
		object("shop", "cart", 5, `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}}`),
		object("bank", "cart", 6, `{"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "DISABLE"}}`),
	}, "10"))
	s.nowLook(t)
	l.all["pod"] = map[string]string{"app": "cart"}
	bank, err := identity.ParseID("spiffe://cluster.local/ns/bank/sa/cart")
	must(t, err)
	for _, tt := range []struct {
		id    identity.ID
		pod   string
		want  policy.Mode
		level policy.Level
	}{
		{cart(t), "pod", policy.Disable, policy.LevelWorkload},
		{cart(t), "another", policy.Strict, policy.LevelClosed},
		{cart(t), "", policy.Strict, policy.LevelClosed},
		{bank, "pod", policy.Strict, policy.LevelClosed},
	} {
		p, _ := s.Policy(tt.id, tt.pod)
		if p.Mode != tt.want || p.Source.Level != tt.level || p.Version != 10 || (p.WorkloadVersion == 7) != (tt.want == policy.Disable) {
			t.Errorf("%s, pod %q: %+v", tt.id, tt.pod, p)
		}
	}
}

// Who says that lost policies are meant to be gone says so of one definition: the
// next one may have the same annotations, from the same file.
func TestT10_LossIsAcceptedForOneDefinition(t *testing.T) {
	for _, tt := range []struct {
		last     record
		uid      string
		accept   string
		policies int
		held     bool
	}{
		{record{}, "1", "", 0, false},
		{record{"1", 5}, "1", "", 0, false},
		{record{"1", 5}, "2", "", 5, false},
		{record{"1", 0}, "2", "", 0, false},
		{record{"1", 5}, "2", "", 4, true},
		{record{"1", 5}, "2", "2", 0, false},
		{record{"1", 5}, "2", "1", 0, true},
		{record{"1", 5}, "2", "true", 0, true},
	} {
		s, _ := newSource(t)
		s.record, s.waits.count = tt.last, tt.policies
		d := new(unstructured.Unstructured)
		d.SetUnstructuredContent(map[string]any{"metadata": map[string]any{"uid": tt.uid, "annotations": map[string]any{AcceptAnnotation: tt.accept}}})
		why := s.judgeDefinition(d)
		if (why != "") != tt.held {
			t.Errorf("%+v: %q", tt, why)
		}
		if want := (record{tt.uid, tt.policies}); !tt.held && s.record != want {
			t.Errorf("%+v: remembered is %+v", tt, s.record)
		}
	}
}

// A change reaches the pods of its namespace, if only because it was taken back; all
// pods where it is the mesh's, or all was listed anew. Who has no pod is told by its
// namespace.
func TestT10_F69_ChangesReachWhomTheyConcern(t *testing.T) {
	s, l := newSource(t)
	shop := cart(t)
	bank, err := identity.ParseID("spiffe://cluster.local/ns/bank/sa/teller")
	must(t, err)
	must(t, s.all.Replace(nil, "10"))
	s.nowLook(t)
	l.all["cart"] = nil
	for _, tt := range []struct {
		name       string
		event      func() error
		shop, bank bool
	}{
		{"the shop's", func() error { return s.all.Add(object("shop", "default", 11, mode("STRICT"))) }, true, false},
		{"the bank's", func() error { return s.all.Add(object("bank", "default", 12, mode("STRICT"))) }, false, true},
		{"one that was taken back", func() error {
			must(t, s.all.Update(object("shop", "default", 13, mode("DISABLE"))))
			return s.all.Update(object("shop", "default", 14, mode("STRICT")))
		}, true, false},
		{"a namespace's without pods", func() error { return s.all.Add(object("quiet", "default", 15, mode("STRICT"))) }, false, false},
		{"none", func() error { return s.all.Bookmark("16") }, false, false},
		{"the mesh's", func() error { return s.all.Add(object(root, "default", 17, mode("STRICT"))) }, true, true},
		{"a list", func() error { return s.all.Replace(nil, "18") }, true, true},
	} {
		_, ofShop := s.Policy(shop, "cart")
		_, ofShopAlone := s.Policy(shop, "")
		_, ofBank := s.Policy(bank, "teller")
		_, ofBankAlone := s.Policy(bank, "")
		must(t, tt.event())
		s.nowLook(t)
		for name, told := range map[string]bool{"cart": isClosed(ofShop) == tt.shop, "shop": isClosed(ofShopAlone) == tt.shop, "teller": isClosed(ofBank) == tt.bank, "bank": isClosed(ofBankAlone) == tt.bank} {
			if !told {
				t.Errorf("a change that is %s: %s is told, or not, where it should be the other way", tt.name, name)
			}
		}
	}
	// Nobody is forgotten for having asked under two names for one pod.
	_, first := s.Policy(shop, "cart")
	_, second := s.Policy(bank, "cart")
	must(t, s.all.Add(object("bank", "default", 19, mode("DISABLE"))))
	s.nowLook(t)
	if !isClosed(first) || !isClosed(second) {
		t.Errorf("told: %v, %v", isClosed(first), isClosed(second))
	}
}

// A watch that is silent for ever is given up, and begun anew.
func TestF25_ASilentWatchEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		client, err := dynamic.NewForConfigAndClient(&rest.Config{Host: "http://api", QPS: -1}, &http.Client{Transport: silent{&asked}})
		must(t, err)
		l := &source{client: client, report: func(error) {}}
		w, err := l.WatchWithContext(t.Context(), meta.ListOptions{})
		must(t, err)
		began := time.Now()
		for range w.ResultChan() {
		}
		w.Stop()
		if took := time.Since(began); took < watches.Lasts+watches.Grace || took > watches.Lasts*3/2+watches.Grace {
			t.Errorf("it was believed for %v", took)
		}
		if n := asked.Load(); n < 60 || n >= 90 {
			t.Errorf("the API server was asked to end it after %d s", n)
		}
	})
}

// silent answers a watch, and then says nothing.
type silent struct{ timeoutSeconds *atomic.Int64 }

func (s silent) RoundTrip(req *http.Request) (*http.Response, error) {
	n, err := strconv.ParseInt(req.URL.Query().Get("timeoutSeconds"), 10, 64)
	s.timeoutSeconds.Store(n)
	body, end := io.Pipe()
	context.AfterFunc(req.Context(), func() { _ = end.CloseWithError(req.Context().Err()) })
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}}, Body: body, Request: req}, err
}
