package self

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

// Names in the state directory; see the package comment.
const (
	markerName    = "initialized"
	anchorName    = "root.pem"
	authorityName = "authority"
	keyName       = "root.key"
	certName      = "root.pem"
	stateName     = "state.json"

	temporarySuffix = ".new"
)

// stateVersion is the version of the state that this program writes, and the
// highest one that it reads.
const stateVersion = 1

// AnchorPath returns the file in a state directory that holds the root's
// certificate for agents to trust.
func AnchorPath(dir string) string { return filepath.Join(dir, anchorName) }

// InitConfig is what [Init] makes a root from.
type InitConfig struct {
	TrustDomain identity.TrustDomain // required
	Lifetime    time.Duration        // zero means 10 years
	Now         func() time.Time     // nil means time.Now
}

// Init makes a root in dir, which is made if it is not there, and returns its
// certificate. A directory that has, or had, a root is refused with
// [*ExistsError] or [*LostError].
//
// If Init fails or the machine stops in the middle of it, there is either no
// root, and Init can be repeated, or the whole root, and it can be used.
func Init(dir string, c InitConfig) (*x509.Certificate, error) { return initialize(osDisk{}, dir, c) }

func initialize(d disk, dir string, c InitConfig) (made *x509.Certificate, err error) {
	if err := ca.RootConfig(c).Check(); err != nil {
		return nil, err
	}
	dir = filepath.Clean(dir) // "state/" has itself for a parent otherwise
	if err := makeDir(d, dir); err != nil {
		return nil, fmt.Errorf("making a root in %q: %w", dir, err)
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if err := checkVirgin(dir); err != nil {
		return nil, err
	}
	made, key, err := ca.NewRoot(ca.RootConfig(c))
	if err != nil {
		return nil, err
	}
	if err := store(d, dir, c.TrustDomain, made, key); err != nil {
		return nil, fmt.Errorf("storing a new root in %q: %w", dir, err)
	}
	return made, nil
}

// makeDir sees to it that the directory is there, closed to others, and will
// still be there after a power cut: whoever made it may not have synced it.
func makeDir(d disk, dir string) error {
	info, err := os.Lstat(dir)
	there := err == nil
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = d.mkdir(dir, 0o700)
	case there && info.Mode().IsRegular():
		return fmt.Errorf("%q is a file; give another --state-dir", dir)
	case there:
		err = checkPrivate(dir, fs.ModeDir|0o700)
	}
	if err != nil {
		return err
	}
	err = d.syncDir(filepath.Dir(dir))
	if there && errors.Is(err, fs.ErrPermission) {
		return nil // whose parent we may not even read was made by somebody else, long ago
	}
	return err
}

// checkVirgin refuses a directory in which a root is or was. Whatever stands at
// the place of a root counts as one, however damaged.
func checkVirgin(dir string) error {
	authority := filepath.Join(dir, authorityName)
	_, err := os.Lstat(authority)
	if err == nil {
		return &ExistsError{Dir: dir}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := lostOrNever(dir); !errors.As(err, new(*NotInitializedError)) {
		return err
	}
	return nil
}

// lostOrNever says of a directory without a root whether it had one: whatever
// is written only after a root exists is proof that one did.
func lostOrNever(dir string) error {
	for _, name := range []string{markerName, anchorName} {
		_, err := os.Lstat(filepath.Join(dir, name))
		if err == nil {
			return &LostError{Dir: dir, File: filepath.Join(dir, authorityName)}
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return &NotInitializedError{Dir: dir}
}

// manifest is state.json. Every byte of the state is covered by it, and every
// byte of it by its being the canonical form of what it says.
type manifest struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`
	Key         string `json:"root_key_sha256"`
	Certificate string `json:"root_certificate_sha256"`
}

func (m *manifest) marshal() ([]byte, error) {
	data, err := json.MarshalIndent(m, "", "  ")
	return append(data, '\n'), err
}

func checksum(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// store writes the root. The order is the promise: all that the folder holds is
// on the disk before the folder gets its name.
func store(d disk, dir string, td identity.TrustDomain, made *x509.Certificate, key crypto.Signer) error {
	keyPEM, err := ca.EncodeRootKey(key)
	if err != nil {
		return err
	}
	certPEM := identity.EncodePEM(made)
	m := manifest{Version: stateVersion, TrustDomain: td.String(), Key: checksum(keyPEM), Certificate: checksum(certPEM)}
	state, err := m.marshal()
	if err != nil {
		return err
	}

	authority := filepath.Join(dir, authorityName)
	building := authority + temporarySuffix
	// What an Init that was interrupted has left was never a root.
	if err := d.removeAll(building); err != nil {
		return err
	}
	if err := d.mkdir(building, 0o700); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
		mode fs.FileMode
	}{{keyName, keyPEM, 0o600}, {certName, certPEM, 0o644}, {stateName, state, 0o600}} {
		if err := writeSynced(d, filepath.Join(building, f.name), f.data, f.mode); err != nil {
			return err
		}
	}
	if err := d.syncDir(building); err != nil {
		return err
	}
	if err := d.rename(building, authority); err != nil {
		return err
	}
	if err := d.syncDir(dir); err != nil {
		return err
	}
	return mark(d, dir, made)
}

// mark writes what follows from a root: the marker that tells of its loss, and
// the copy of its certificate for others.
func mark(d disk, dir string, root *x509.Certificate) error {
	if err := replace(d, dir, filepath.Join(dir, markerName), marker(root), 0o600); err != nil {
		return err
	}
	return replace(d, dir, AnchorPath(dir), identity.EncodePEM(root), 0o644)
}

func marker(root *x509.Certificate) []byte {
	return fmt.Appendf(nil, "meshca root %x\n", root.SubjectKeyId)
}
