package certs

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/test/interop/lint"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// What a library is asked to do with a kind of certificate.
const (
	path    = "path"   // verify it by its own tool
	client  = "client" // dial us in mutual TLS; both sides verify
	service = "server" // be dialled by us, likewise
)

// cell is one question to a library. Its answer is empty for yes, and otherwise
// why not.
type cell struct{ kind, what string }

type verdicts map[cell]string

// library is somebody else's TLS.
type library struct {
	name     string
	programs []string // that must be installed
	version  []string // a command that tells which one it is
	ask      func(t *testing.T, f *fixture) verdicts
	noPaths  bool // it verifies paths in handshakes only
	// refuses are the answers that are not yes, each with a part of the reason.
	// Whatever the library refuses beyond these fails the test, and so does
	// what it has learnt to take.
	refuses map[cell]string
}

func libraries() []library {
	return []library{
		{name: "OpenSSL", programs: []string{"openssl"}, version: []string{"openssl", "version"}, ask: askOpenSSL},
		{
			name: "GnuTLS", programs: []string{"certtool", "gnutls-cli", "gnutls-serv"},
			version: []string{"certtool", "--version"}, ask: askGnuTLS,
		},
		{name: "Node", programs: []string{"node"}, version: []string{"node", "--version"}, ask: askNode, noPaths: true},
		{name: "Java", programs: []string{"java", "javac"}, version: []string{"java", "--version"}, ask: askJava},
		{name: "Python", programs: []string{"python3"}, version: []string{"python3", "--version"}, ask: askPython, noPaths: true},
	}
}

// fixture is what every library is shown.
type fixture struct {
	kinds []*kind
	ports map[*kind]string // where something of ours listens with it
}

func TestForeignLibraries(t *testing.T) {
	all, kit := kinds(t)
	f := &fixture{kinds: all, ports: make(map[*kind]string)}
	for _, k := range f.kinds {
		switch {
		case k.ours != nil:
			f.ports[k] = k.serve(t)
		case k.host != "":
			f.ports[k] = serveCA(t, kit)
		}
	}
	answers := make(map[string]verdicts)
	for _, l := range libraries() {
		t.Run(l.name, func(t *testing.T) {
			need(t, l.programs...)
			answers[l.name] = l.ask(t, f)
			judge(t, l, f, answers[l.name])
		})
	}
	t.Run("zlint", func(t *testing.T) {
		for _, k := range f.kinds {
			findings, err := lint.Certificate(k.certificate)
			must(t, err)
			for _, finding := range findings {
				t.Errorf("%s: %s", k.name, finding)
			}
		}
	})
	t.Run("docs/interop.md", func(t *testing.T) { checkPage(t, f, answers) })
}

// judge compares what a library said with what it is expected to say.
func judge(t *testing.T, l library, f *fixture, got verdicts) {
	t.Helper()
	for _, k := range f.kinds {
		for _, what := range k.questions() {
			if what == path && l.noPaths {
				continue
			}
			c := cell{k.name, what}
			reason, asked := got[c]
			want, refused := l.refuses[c]
			switch {
			case !asked:
				t.Errorf("%s was not asked: %s as %s", l.name, k.name, what)
			case k.foreign && what != path:
				if reason == "" {
					t.Errorf("%s as %s: believed a peer under an unknown root", l.name, what)
				}
				t.Logf("%s as %s, of a stranger: %s", l.name, what, reason)
			case !refused && reason != "":
				t.Errorf("%s as %s: refused: %s", k.name, what, reason)
			case refused && reason == "":
				t.Errorf("%s as %s: taken now; it is listed as refused because of %q: take it off the list", k.name, what, want)
			case refused && !strings.Contains(reason, want):
				t.Errorf("%s as %s: refused: %s; listed is %q", k.name, what, reason, want)
			}
		}
	}
	for _, c := range slices.Collect(maps.Keys(l.refuses)) {
		if _, asked := got[c]; !asked {
			t.Errorf("the list of what %s refuses has %v, which it was not asked", l.name, c)
		}
	}
}

// questions are those that make sense for the kind.
func (k *kind) questions() []string {
	switch {
	case k.isCA():
		return []string{path}
	case k.ours == nil:
		return []string{path, client}
	}
	return []string{path, client, service}
}

// handshake notes what became of a client of theirs: what it printed of our
// answer, or the protocol on the CA's port.
func (v verdicts) handshake(k *kind, said string, err error) {
	want := "peer " + k.id
	if k.host != "" {
		want = "protocol h2"
	}
	c := cell{k.name, client}
	switch {
	case err == nil && strings.Contains(said, want):
		v[c] = ""
	case err != nil:
		v[c] = fmt.Sprintf("%v: %s", err, said)
	default:
		v[c] = fmt.Sprintf("it said %q, without %q", said, want)
	}
}

// dialled notes what became of our call to a server of theirs, which answers
// want.
func (v verdicts) dialled(t *testing.T, k *kind, port, want string) {
	t.Helper()
	c := cell{k.name, service}
	v[c] = ""
	if line, err := k.dial(t, port); err != nil {
		v[c] = err.Error()
	} else if line != want {
		v[c] = fmt.Sprintf("it answered %q; want %q", line, want)
	}
}
