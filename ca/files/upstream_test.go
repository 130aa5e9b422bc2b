package files

import (
	"context"
	"crypto/x509"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/inputfile"
)

// What is signed with each kind of authority, in both layouts.
func TestT5_F49_Signs(t *testing.T) {
	root := newRoot(t, "Root CA")
	other := newRoot(t, "Other Root CA")
	policy := root.below(t, "Policy CA")
	mesh := policy.below(t, "Mesh CA", func(c *x509.Certificate) { c.MaxPathLen = 1 })
	istio := root.below(t, "Intermediate CA", pathLen0)
	limited := newRoot(t, "Limited Root CA", func(c *x509.Certificate) { c.MaxPathLen = 1 })
	under := limited.below(t, "Under It")
	anchored := root.below(t, "Anchored CA")

	for _, tt := range []struct {
		name   string
		ca     *authority
		chain  []*x509.Certificate // in the file
		roots  []*x509.Certificate // in the file
		want   []*x509.Certificate // of the chain, after ours
		anchor *x509.Certificate
		direct bool   // nothing was signed
		note   string // a part of one
	}{
		{name: "root", ca: root, roots: certs(root), anchor: root.cert},
		{name: "root beside another", ca: root, roots: certs(other, root), anchor: root.cert},
		{name: "intermediate", ca: policy, roots: certs(root), anchor: root.cert, want: certs(policy)},
		{name: "intermediate of an intermediate", ca: mesh, chain: certs(policy), roots: certs(root), anchor: root.cert, want: certs(mesh, policy)},
		{name: "chain in another order, with what does not belong", ca: mesh, chain: certs(root, anchored, policy), roots: certs(other, root), anchor: root.cert, want: certs(mesh, policy), note: `"CN=Anchored CA,O=Operator" in `},
		{name: "Istio's recipe", ca: istio, roots: certs(root), anchor: root.cert, want: certs(istio), direct: true, note: "has path length 0; meshca cannot rotate that key"},
		{name: "a path length that ends with it", ca: under, roots: certs(limited), anchor: limited.cert, want: certs(under), direct: true, note: `"CN=Limited Root CA,O=Operator" has a path length that ends at `},
		{name: "an intermediate is the anchor", ca: anchored, roots: certs(anchored), anchor: anchored.cert, note: "is not self-signed"},
	} {
		for layout, files := range map[string]fileSet{
			"cacerts": tt.ca.cacerts(t, tt.chain, tt.roots...), "tls": tt.ca.tls(t, tt.chain, tt.roots...),
		} {
			t.Run(tt.name+"/"+layout, func(t *testing.T) {
				if layout == "cacerts" && tt.name == "chain in another order, with what does not belong" {
					files["cert-chain.pem"] = identity.EncodePEM(certs(root, anchored, policy, mesh)...)
				}
				dir := t.TempDir()
				files.put(t, dir)
				u := open(t, dir)
				s, key, err := ask(t, u, time.Hour)
				check(t, err)
				got := s.Chain
				if tt.direct {
					if s.Key == nil || !belongs(s.Key, tt.ca.cert) {
						t.Errorf("the key is not the CA's")
					}
				} else {
					if s.Key != nil {
						t.Errorf("the CA's key is given away")
					}
					got = got[1:]
				}
				if !equal(got, tt.want) {
					t.Errorf("the chain is %v", subjects(s.Chain))
				}
				if len(s.Roots) != len(tt.roots) || !s.Roots[0].Equal(tt.anchor) {
					t.Errorf("the roots are %v", subjects(s.Roots))
				}
				if s.Sequence != 0 {
					t.Errorf("it counts versions: %d", s.Sequence)
				}
				believe(t, s, key)
				r := u.Report()
				if r.State != StateOK || r.Kind != "files" || r.Away || r.Detail != "" {
					t.Errorf("the report is %+v", r)
				}
				if notes := strings.Join(r.Notes, "\n"); (notes == "") != (tt.note == "") || !strings.Contains(notes, tt.note) {
					t.Errorf("the notes are %q, want %q", notes, tt.note)
				}
			})
		}
	}
}

// An intermediate ends no later than anything above it.
func TestT5_F49_IntermediateEndsWithItsPath(t *testing.T) {
	root := newRoot(t, "Root CA", lasting(48*time.Hour))
	policy := root.below(t, "Policy CA", lasting(30*time.Hour))
	mesh := policy.below(t, "Mesh CA")
	dir := t.TempDir()
	mesh.tls(t, certs(policy), root.cert).put(t, dir)
	s, key, err := ask(t, open(t, dir), 72*time.Hour)
	check(t, err)
	ours := s.Chain[0]
	if ours.NotAfter.After(policy.cert.NotAfter) || ours.NotAfter.Before(policy.cert.NotAfter.Add(-2*time.Second)) {
		t.Errorf("ends at %v, and its path at %v", ours.NotAfter, policy.cert.NotAfter)
	}
	if !ours.MaxPathLenZero || len(ours.PermittedURIDomains) > 0 {
		t.Errorf("path length %d, constraints %v", ours.MaxPathLen, ours.PermittedURIDomains)
	}
	believe(t, s, key)
}

// A replacement that is good comes into use, in every way in which files are replaced.
func TestF49_NewSetComesIntoUse(t *testing.T) {
	root := newRoot(t, "Root CA")
	first, second := root.below(t, "First CA"), root.below(t, "Second CA")
	files := func(a *authority) fileSet { return a.cacerts(t, nil, root.cert) }
	for name, ways := range map[string]struct{ before, after func(dir string) }{
		"file by file": {func(dir string) { files(first).put(t, dir) }, func(dir string) { files(second).put(t, dir) }},
		"by a kubelet": {
			func(dir string) { files(first).project(t, dir, "..1") },
			func(dir string) { files(second).project(t, dir, "..2") },
		},
		"by a link": {
			func(dir string) {
				files(first).put(t, made(t, dir+"-1"))
				check(t, os.Remove(dir))
				check(t, os.Symlink(dir+"-1", dir))
			},
			func(dir string) {
				files(second).put(t, made(t, dir+"-2"))
				check(t, os.Remove(dir))
				check(t, os.Symlink(dir+"-2", dir))
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := made(t, filepath.Join(t.TempDir(), "ca"))
				// Certificates of this test are made at the bubble's time.
				root = newRoot(t, "Root CA")
				first, second = root.below(t, "First CA"), root.below(t, "Second CA")
				ways.before(dir)
				u := open(t, dir)
				run(t, u)
				if got := u.issuer(); !got.Equal(first.cert) {
					t.Fatalf("at first it is %v", got.Subject)
				}
				changed := u.Changed()
				ways.after(dir)
				next()
				select {
				case <-changed:
				default:
					t.Error("nobody was told")
				}
				if got := u.issuer(); !got.Equal(second.cert) {
					t.Errorf("then it is %v", got.Subject)
				}
			})
		})
	}
}

// A change is seen at once where the filesystem tells of it.
func TestF49_Watched(t *testing.T) {
	root := newRoot(t, "Root CA")
	dir := t.TempDir()
	root.below(t, "First CA").tls(t, nil, root.cert).project(t, dir, "..1")
	reads, watching := 0, make(chan struct{})
	u := open(t, dir, func(c *Config) {
		c.noWatch, c.poll = false, time.Hour
		c.readFile = func(path string, most int) ([]byte, fs.FileMode, error) {
			defer func() {
				if reads++; reads == 9 { // three files, twice by New and once by Run
					close(watching)
				}
			}()
			return inputfile.ReadWithMode(path, most)
		}
	})
	run(t, u)
	<-watching
	changed, began := u.Changed(), time.Now()
	root.below(t, "Second CA").tls(t, nil, root.cert).project(t, dir, "..2")
	select {
	case <-changed:
		if d := time.Since(began); d < settle {
			t.Errorf("used after %v, before it could be known that all files are there", d)
		}
	case <-time.After(20 * time.Second):
		t.Error("not seen")
	}
}

func run(t *testing.T, u *Upstream) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- u.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// issuer is the CA in force.
func (u *Upstream) issuer() *x509.Certificate {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.inForce.cert()
}

func certs(list ...*authority) []*x509.Certificate {
	var out []*x509.Certificate
	for _, a := range list {
		out = append(out, a.cert)
	}
	return out
}

func subjects(list []*x509.Certificate) []string {
	var out []string
	for _, c := range list {
		out = append(out, c.Subject.CommonName)
	}
	return out
}

func made(t *testing.T, dir string) string {
	t.Helper()
	check(t, os.Mkdir(dir, 0o700))
	return dir
}
