package delivery

import (
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/test/bench/rig"
)

// operator has a CA of its own in files, which the mesh is under, and changes there
// which roots are to be believed.
type operator struct {
	run   *rig.Run
	td    identity.TrustDomain
	dir   string
	roots []*x509.Certificate
}

// newOperator makes the files, and has meshes that are started from now on use them.
func newOperator(r *rig.Run) (*operator, error) {
	td, err := identity.ParseTrustDomain("cluster.local")
	if err != nil {
		return nil, err
	}
	o := &operator{run: r, td: td, dir: filepath.Join(r.Dir, "cacerts")}
	if err := os.Mkdir(o.dir, 0o700); err != nil {
		return nil, err
	}
	root, key, err := ca.NewRoot(ca.RootConfig{TrustDomain: td})
	if err != nil {
		return nil, err
	}
	keyPEM, err := ca.EncodeRootKey(key)
	if err != nil {
		return nil, err
	}
	for name, content := range map[string][]byte{"tls.crt": identity.EncodePEM(root), "tls.key": keyPEM} {
		if err := os.WriteFile(filepath.Join(o.dir, name), content, 0o600); err != nil {
			return nil, err
		}
	}
	r.MeshConfig = fmt.Sprintf("upstream: {files: {dir: %q, layout: tls}}\n", o.dir)
	return o, o.believe(root)
}

// newRoot makes a root that nothing is signed by yet.
func (o *operator) newRoot() (*x509.Certificate, error) {
	root, _, err := ca.NewRoot(ca.RootConfig{TrustDomain: o.td})
	return root, err
}

// believe adds a root to those that are to be believed.
func (o *operator) believe(root *x509.Certificate) error {
	o.roots = append(o.roots, root)
	whole, err := o.run.Write("ca.crt.new", identity.EncodePEM(o.roots...))
	if err != nil {
		return err
	}
	return os.Rename(whole, filepath.Join(o.dir, "ca.crt"))
}
