package csi

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/identity"
)

// Whatever path is taken is below the kubelet's folder of pods, and is what it
// says.
func FuzzTarget(f *testing.F) {
	p := pods{"/var/lib/kubelet/pods"}
	f.Add("/var/lib/kubelet/pods/7f9c1e2a-4f0e-4c3e-9d55-0a1b2c3d4e5f/volumes/kubernetes.io~csi/meshca/mount")
	f.Add("/var/lib/kubelet/pods/../volumes/kubernetes.io~csi/meshca/mount")
	f.Add("/var/lib/kubelet/pods/a/volumes/kubernetes.io~csi/../mount")
	f.Fuzz(func(t *testing.T, path string) {
		got, err := p.parse(path)
		if err != nil {
			return
		}
		want := filepath.Join(p.dir, got.pod, "volumes", "kubernetes.io~csi", got.volume, "mount")
		if path != want || got.path != path || filepath.Clean(path) != path || !filepath.IsLocal(strings.TrimPrefix(path, "/")) {
			t.Errorf("%q was taken as %+v", path, got)
		}
	})
}

// What is written is read again, and nothing is read that is another volume's.
func FuzzEntry(f *testing.F) {
	f.Add("csi-1", []byte(`{"version":1,"volume":"csi-1","target":"/k","token":"t","published":true}`))
	f.Add("csi-1", []byte(`{"version":1,"volume":"csi-2"}`))
	f.Add("", []byte("null"))
	f.Fuzz(func(t *testing.T, volume string, data []byte) {
		name := entryName(volume)
		e, err := parseEntry(name, data)
		if err != nil {
			return
		}
		if e.Volume != volume && entryName(e.Volume) != name {
			t.Errorf("the entry of %q was taken for that of %q", e.Volume, volume)
		}
		again, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := parseEntry(name, again); err != nil || back != e {
			t.Errorf("read again: %+v, %v", back, err)
		}
	})
}

// Whatever is taken of what a kubelet says is fit for logs, paths and events.
func FuzzClaim(f *testing.F) {
	td, err := identity.ParseTrustDomain("cluster.local")
	if err != nil {
		f.Fatal(err)
	}
	p := pods{"/k/pods"}
	f.Add("csi-1", "/k/pods/u/volumes/kubernetes.io~csi/v/mount", "shop", "cart-0.x", "u", "cart")
	f.Fuzz(func(t *testing.T, id, path, namespace, pod, uid, account string) {
		c, err := newClaim(td, p, id, path, namespace, pod, uid, account)
		if err != nil {
			return
		}
		for _, s := range []string{c.id, c.who(), c.target.path, c.spiffeID.String()} {
			if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) || len(s) > 600 {
				t.Errorf("taken: %q", s)
			}
		}
		if c.target.pod != uid || strings.Count(c.who(), "/") != 1 {
			t.Errorf("taken: %+v", c)
		}
	})
}
