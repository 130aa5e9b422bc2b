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

	"github.com/prometheus/client_golang/prometheus"
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
	record      string
	root        string           // namespace
	now         func() time.Time // the wall clock
	log         safeBuffer
	source      *Source
	stop        func()
}

func newRig(t *testing.T) *rig {
	t.Helper()
	root := t.TempDir()
	r := &rig{
		t: t, dir: filepath.Join(root, "policies"), labels: filepath.Join(root, "labels.yaml"), record: filepath.Join(root, "policy.json"),
		root: "meshca-system", now: time.Now,
	}
	if err := os.Mkdir(r.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return r
}

// start runs a source, as a new process would.
func (r *rig) start(labels string) {
	r.t.Helper()
	log := slog.New(slog.NewTextHandler(&r.log, nil))
	dir, err := policydir.New(policydir.Config{Dir: r.dir, RootNamespace: r.root, Log: log})
	if err != nil {
		r.t.Fatal(err)
	}
	if r.source, err = New(Config{Policies: dir, LabelsFile: labels, Record: r.record, Now: r.now, Log: log, Metrics: prometheus.NewRegistry()}); err != nil {
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

// read has a source that does not run look at the files.
func (r *rig) read(snapshot *policydir.Snapshot) {
	for r.source.labels.look() != 0 {
	}
	r.source.look(snapshot, time.Now())
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
	if p := r.await("cart", "known again", mode(policy.Strict)); p.Version < last {
		t.Errorf("the next process has version %d, the last one had %d", p.Version, last)
	}
}

// What holds after a restart may take the place of what agents have, whatever has
// changed meanwhile; where nothing has, it is the same version.
func TestT10_VersionsSurviveRestarts(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*rig)
		labels bool // after the restart
		same   bool
		want   policy.Mode
	}{
		{name: "nothing", same: true, want: policy.Permissive},
		{name: "another root namespace", change: func(r *rig) { r.root = "istio-system" }, want: policy.Strict},
		{name: "labels that are older than the policies", labels: true, want: policy.Disable},
		{name: "an older directory in its place", change: func(r *rig) { r.exchange("older") }, want: policy.Disable},
		{name: "a clock that was ahead", change: func(r *rig) {
			r.now = func() time.Time { return time.Now().Add(-24 * time.Hour) }
			r.policy("default", "shop", "{mtls: {mode: STRICT}}")
		}, want: policy.Strict},
		{name: "a lost record", change: func(r *rig) { r.remove(r.record) }, want: policy.Permissive},
		{name: "a damaged record", change: func(r *rig) { r.write(r.record, "{") }, want: policy.Permissive},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			r.write(r.labels, cartLabels)
			real := r.dir
			r.dir = filepath.Join(filepath.Dir(real), "older")
			if err := os.Mkdir(r.dir, 0o700); err != nil {
				t.Fatal(err)
			}
			r.policy("default", "shop", "{mtls: {mode: DISABLE}}")
			r.dir = real
			r.policy("mesh", "istio-system", "{mtls: {mode: STRICT}}")
			r.policy("cart", "shop", "{selector: {matchLabels: {app: cart}}, mtls: {mode: DISABLE}}")
			r.remove(filepath.Join(r.dir, "cart.yaml"))
			r.policy("default", "bank", "{mtls: {mode: STRICT}}")
			if tt.labels {
				r.policy("cart", "shop", "{selector: {matchLabels: {app: cart}}, mtls: {mode: DISABLE}}")
			}
			r.start("")
			first := policy.Permissive
			if tt.labels {
				first = policy.Strict // nobody's labels are known
			}
			held := r.await("cart", "known", mode(first))
			r.stop()
			if tt.change != nil {
				tt.change(r)
			}
			labels := ""
			if tt.labels {
				labels = r.labels
			}
			r.start(labels)
			next := r.await("cart", "known after the restart", mode(tt.want))
			if !held.Follows(*next) || tt.same && next.Version != held.Version {
				t.Errorf("version %d (%v) after %d (%v)", next.Version, next.Mode, held.Version, held.Mode)
			}
		})
	}
}

// exchange puts another directory in the place of the one with the policies.
func (r *rig) exchange(name string) {
	r.t.Helper()
	if err := os.Rename(r.dir, r.dir+".away"); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(filepath.Dir(r.dir), name), r.dir); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) remove(path string) {
	r.t.Helper()
	if err := os.Remove(path); err != nil {
		r.t.Fatal(err)
	}
}

// A directory that is empty at the start, and was not when the last process ended,
// is not believed: agents keep what they have. It fills slowly, and counts when it
// is quiet.
func TestT10_EmptyOrFillingDirectoryIsNotBelieved(t *testing.T) {
	r := newRig(t)
	r.policy("default", "shop", "{mtls: {mode: STRICT}}")
	r.start("")
	held := r.await("cart", "strict", mode(policy.Strict))
	r.stop()
	r.remove(filepath.Join(r.dir, "default.yaml"))
	r.start("")
	if p := r.await("cart", "judged", func(p *policy.Resolved) bool { return p != nil }); p.Version != 0 || p.Mode != policy.Strict {
		t.Errorf("an empty directory: %+v", p)
	}
	began := time.Now()
	r.policy("default", "bank", "{mtls: {mode: STRICT}}")
	r.policy("default2", "shop", "{mtls: {mode: STRICT}}")
	next := r.await("cart", "known", func(p *policy.Resolved) bool { return p.Version != 0 })
	if next.Mode != policy.Strict || !held.Follows(*next) {
		t.Errorf("what came first: %+v after %+v", next, held)
	}
	if took := time.Since(began); took < quiet {
		t.Errorf("it counted after %v", took)
	}
	r.stop()
	// Whoever means it says so.
	for _, name := range []string{"default.yaml", "default2.yaml"} {
		r.remove(filepath.Join(r.dir, name))
	}
	r.write(filepath.Join(r.dir, "none.yaml"), "{apiVersion: v1, kind: List, items: []}")
	r.start("")
	r.await("cart", "without any policy", mode(policy.Permissive))
}

// A hundred changes one after another are a few versions.
func TestChangesAreGathered(t *testing.T) {
	r := newRig(t)
	r.start("")
	r.await("cart", "known", mode(policy.Permissive))
	began, versions := time.Now(), map[uint64]bool{}
	for i := range 100 {
		r.policy("default", "shop", "{mtls: {mode: "+[]string{"DISABLE", "STRICT"}[i%2]+"}}")
		p, _, _ := r.source.resolve(id(t, "cart"))
		versions[p.Version] = true
	}
	r.await("cart", "strict", mode(policy.Strict))
	if most := int(time.Since(began)/together) + 2; len(versions) > most {
		t.Errorf("%d versions in %v", len(versions), time.Since(began))
	}
}

// Processes that share the record and say the same have the same version.
func TestV8_ProcessesAgreeOnVersions(t *testing.T) {
	shared := record{filepath.Join(t.TempDir(), "policy.json")}
	var mu sync.Mutex
	versions := map[string]map[uint64]bool{}
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			content := []string{"a", "b"}[i%2]
			v, err := shared.next(content, 1, 0, time.UnixMilli(1000))
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			for other, taken := range versions {
				if other != content && taken[v] {
					t.Errorf("version %d is two contents", v)
				}
			}
			if versions[content] == nil {
				versions[content] = map[uint64]bool{}
			}
			versions[content][v] = true
		})
	}
	all.Wait()
	last, err := shared.load()
	if err != nil || last.Version < 1000 {
		t.Errorf("%+v, %v", last, err)
	}
	if v, err := shared.next(last.Content, 1, last.Version, time.UnixMilli(0)); v != last.Version || err != nil {
		t.Errorf("the same content: %d, %v, want %d", v, err, last.Version)
	}
}

// A record that cannot be written costs no policy.
func TestF37_RecordThatCannotBeWritten(t *testing.T) {
	r := newRig(t)
	r.record = filepath.Join(r.dir, "missing", "policy.json")
	r.policy("default", "shop", "{mtls: {mode: STRICT}}")
	r.start("")
	first := r.await("cart", "strict", mode(policy.Strict))
	r.policy("default", "shop", "{mtls: {mode: DISABLE}}")
	if next := r.await("cart", "disabled", mode(policy.Disable)); next.Version <= first.Version {
		t.Errorf("version %d after %d", next.Version, first.Version)
	}
	if !strings.Contains(r.log.String(), "may not be found again") {
		t.Error("nobody is told")
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
		r.read(snapshot)
		if p, _, _ := r.source.resolve(id(t, "cart")); p != nil && p.Version != 0 {
			t.Errorf("%s: %+v", name, p)
		}
	}
	r.write(r.labels, cartLabels)
	r.read(&policydir.Snapshot{Version: 1, Set: policy.Closed("unread")})
	if p, _, _ := r.source.resolve(id(t, "cart")); p.Version != 0 || p.Mode != policy.Strict {
		t.Errorf("labels without policies: %+v", p)
	}
	r.read(known)
	if p, _, _ := r.source.resolve(id(t, "cart")); p.Version == 0 {
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
		"unknown key":     {"workloads:\n  - {namespace: shop, service_acount: cart}\n", `line 2: unknown key "service_acount"`},
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
