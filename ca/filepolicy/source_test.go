package filepolicy

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/policydir"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// rig is a source over real files.
type rig struct {
	t           *testing.T
	dir, labels string
	log         safeBuffer
	source      *Source
	stop        func()
}

func newRig(t *testing.T) *rig {
	t.Helper()
	root := t.TempDir()
	r := &rig{t: t, dir: filepath.Join(root, "policies"), labels: filepath.Join(root, "labels.yaml")}
	if err := os.Mkdir(r.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return r
}

// start runs a source, as a new process would.
func (r *rig) start(labels string) {
	r.t.Helper()
	log := slog.New(slog.NewTextHandler(&r.log, nil))
	dir, err := policydir.New(policydir.Config{Dir: r.dir, RootNamespace: "meshca-system", Log: log})
	if err != nil {
		r.t.Fatal(err)
	}
	if r.source, err = New(Config{Policies: dir, LabelsFile: labels, Log: log}); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range []func(context.Context) error{dir.Run, r.source.Run} {
		running.Go(func() {
			if err := run(ctx); err != nil {
				r.t.Errorf("Run: %v", err)
			}
		})
	}
	r.stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	r.t.Cleanup(r.stop)
}

// write replaces a file at once, as programs should.
func (r *rig) write(path, content string) {
	r.t.Helper()
	next := filepath.Join(filepath.Dir(r.dir), "next")
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) policy(name, namespace, rest string) {
	r.t.Helper()
	r.write(filepath.Join(r.dir, name+".yaml"), "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: "+name+", namespace: "+namespace+"}\nspec: "+rest+"\n")
}

func id(t *testing.T, account string) identity.ID {
	return identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/"+account)
}

// await waits until what holds for an account satisfies is.
func (r *rig) await(account, what string, is func(*policy.Resolved) bool) *policy.Resolved {
	r.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		now, changed, _ := r.source.resolve(id(r.t, account))
		if is(now) {
			return now
		}
		select {
		case <-changed:
		case <-timeout:
			r.t.Fatalf("%s never %s; the last: %+v\n%s", account, what, now, r.log.String())
		}
	}
}

func mode(want policy.Mode) func(*policy.Resolved) bool {
	return func(r *policy.Resolved) bool { return r != nil && r.Mode == want }
}

const cartLabels = "workloads:\n  - {namespace: shop, service_account: cart, labels: {app: cart}}\n"

// Policies and labels are followed while they change; versions only rise, in the
// next process too, and what is broken keeps what was.
func TestT10_PoliciesAndLabelsAreFollowed(t *testing.T) {
	r := newRig(t)
	r.policy("default", "shop", "{mtls: {mode: PERMISSIVE}}")
	r.policy("cart", "shop", "{selector: {matchLabels: {app: cart}}, mtls: {mode: DISABLE}}")
	r.start(r.labels)
	first, changed, _ := r.source.resolve(id(t, "cart"))
	if first != nil {
		t.Fatalf("before the labels are known: %+v", first)
	}
	r.write(r.labels, cartLabels)
	<-changed
	last := r.await("cart", "selected", mode(policy.Disable)).Version

	rises := func(p *policy.Resolved) {
		t.Helper()
		if p.Version <= last {
			t.Errorf("version %d after %d", p.Version, last)
		}
		last = p.Version
	}
	r.policy("cart", "shop", "{selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}}")
	rises(r.await("cart", "strict", mode(policy.Strict)))
	r.write(r.labels, strings.Replace(cartLabels, "app: cart", "app: other", 1))
	rises(r.await("cart", "unselected", mode(policy.Permissive)))
	r.write(r.labels, cartLabels)
	rises(r.await("cart", "selected again", mode(policy.Strict)))
	if err := os.Remove(filepath.Join(r.dir, "cart.yaml")); err != nil {
		t.Fatal(err)
	}
	rises(r.await("cart", "without its policy", mode(policy.Permissive)))

	// What cannot be read takes nothing away.
	r.write(r.labels, "workloads: [{namespace: shop}]\n")
	r.policy("default", "shop", "{mtls: {mood: STRICT}}")
	r.policy("more", "bank", "{mtls: {mode: STRICT}}") // comes into force beside it
	before := last
	rises(r.await("cart", "told of a newer version", func(p *policy.Resolved) bool { return p.Version > before }))
	if p, _, _ := r.source.resolve(id(t, "cart")); p.Mode != policy.Permissive {
		t.Errorf("after mistakes: %+v", p)
	}

	// The next process does not begin behind the last one.
	r.policy("default", "shop", "{mtls: {mode: STRICT}}")
	r.write(r.labels, cartLabels)
	rises(r.await("cart", "strict for all", mode(policy.Strict)))
	r.stop()
	r.start(r.labels)
	if p := r.await("cart", "known again", mode(policy.Strict)); p.Version+2 < last { // two: the last two changes may have shared a number
		t.Errorf("the next process has version %d, the last one had %d", p.Version, last)
	}
}

// Before both the policies and the labels are known, nothing is: whoever was told of
// one alone might be told too little.
func TestT10_NothingBeforeBothAreKnown(t *testing.T) {
	r := newRig(t)
	r.policy("default", "shop", "{mtls: {mode: PERMISSIVE}}")
	r.start(r.labels)
	r.stop()
	known := &policydir.Snapshot{Version: 1, Set: policy.New(nil, "meshca-system")}
	for name, snapshot := range map[string]*policydir.Snapshot{"policies without labels": known, "neither": {}} {
		r.source.labels.look()
		r.source.publish(snapshot)
		if p, _, _ := r.source.resolve(id(t, "cart")); p != nil {
			t.Errorf("%s: %+v", name, p)
		}
	}
	r.write(r.labels, cartLabels)
	r.source.labels.look()
	r.source.publish(&policydir.Snapshot{Version: 1, Set: policy.Closed("unread")})
	if p, _, _ := r.source.resolve(id(t, "cart")); p != nil {
		t.Errorf("labels without policies: %+v", p)
	}
	r.source.publish(known)
	if p, _, _ := r.source.resolve(id(t, "cart")); p == nil {
		t.Error("both are known, and nothing is said")
	}
}

// A workload that the file does not name is STRICT where a policy might select it,
// and is told of.
func TestT10_UnknownLabelsAreStrict(t *testing.T) {
	r := newRig(t)
	r.policy("open", "shop", "{selector: {matchLabels: {app: cart}}, mtls: {mode: DISABLE}}")
	r.write(r.labels, cartLabels)
	r.start(r.labels)
	r.await("cart", "selected", mode(policy.Disable))
	p, _, unlabelled := r.source.resolve(id(t, "pay"))
	if p.Mode != policy.Strict || p.Source.Level != policy.LevelClosed || !unlabelled {
		t.Errorf("%+v, %v", p, unlabelled)
	}
	r.source.tell(id(t, "pay"))
	r.source.tell(id(t, "pay"))
	if n := strings.Count(r.log.String(), "labels are not known"); n != 1 {
		t.Errorf("told %d times:\n%s", n, r.log.String())
	}
	if err := os.Remove(filepath.Join(r.dir, "open.yaml")); err != nil {
		t.Fatal(err)
	}
	r.await("pay", "of no interest to a selector", mode(policy.Permissive))
}

// Without a file of labels nobody's are known.
func TestT10_NoLabelsFile(t *testing.T) {
	r := newRig(t)
	r.policy("cart", "shop", "{selector: {matchLabels: {app: cart}}, mtls: {mode: DISABLE}}")
	r.policy("mesh", "meshca-system", "{mtls: {mode: PERMISSIVE}}")
	r.start("")
	r.await("cart", "strict", mode(policy.Strict))
}

func TestPolicyOfNoWorkload(t *testing.T) {
	r := newRig(t)
	r.policy("mesh", "meshca-system", "{mtls: {mode: DISABLE}}")
	r.start("")
	r.await("cart", "known", mode(policy.Disable))
	if p, _, _ := r.source.resolve(identitytest.ID(t, "spiffe://cluster.local/vm/db")); p != nil {
		t.Errorf("an ID without a namespace has %+v", p)
	}
}

func TestF63_LabelsAreReadStrictly(t *testing.T) {
	for name, tt := range map[string]struct{ content, want string }{
		"empty":           {"", "empty"},
		"no YAML":         {"\t{", "yaml"},
		"unknown key":     {"workloads:\n  - {namespace: shop, service_acount: cart}\n", "service_acount"},
		"two documents":   {"workloads: []\n---\nworkloads: []\n", "more than one"},
		"bad namespace":   {"workloads:\n  - {namespace: Shop, service_account: cart}\n", "not a DNS label"},
		"bad account":     {"workloads:\n  - {namespace: shop, service_account: ../admin}\n", "not a DNS subdomain"},
		"named twice":     {"workloads:\n  - {namespace: shop, service_account: cart}\n  - {namespace: shop, service_account: cart}\n", "twice"},
		"label twice":     {"workloads:\n  - {namespace: shop, service_account: cart, labels: {a: b, a: c}}\n", "already defined"},
		"label no text":   {"workloads:\n  - {namespace: shop, service_account: cart, labels: {a: [b]}}\n", "cannot unmarshal"},
		"empty key":       {"workloads:\n  - {namespace: shop, service_account: cart, labels: {\"\": b}}\n", "0 bytes"},
		"a long value":    {"workloads:\n  - {namespace: shop, service_account: cart, labels: {a: " + strings.Repeat("b", 64) + "}}\n", "64 bytes"},
		"a list at first": {"- a\n", "cannot unmarshal"},
	} {
		if got, err := parseLabels([]byte(tt.content)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, %v; want %q", name, got, err, tt.want)
		}
	}
	if got, err := parseLabels([]byte("workloads: []\n")); err != nil || len(got) != 0 || got == nil {
		t.Errorf("no workload: %v, %v", got, err)
	}
}

func FuzzParseLabels(f *testing.F) {
	f.Add([]byte(cartLabels))
	f.Add([]byte("workloads: &a\n  - {namespace: shop, service_account: cart, labels: {app: *a}}\n"))
	f.Add([]byte("{\"workloads\": [{\"namespace\": \"a\", \"service_account\": \"b\", \"labels\": null}]}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := parseLabels(data)
		if err != nil {
			return
		}
		for w, labels := range all {
			if w.namespace == "" || w.account == "" || len(labels) > maxLabels {
				t.Errorf("taken: %+v %v", w, labels)
			}
		}
	})
}
