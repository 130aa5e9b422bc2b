package self

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

// Config is what [Open] takes beside the directory.
type Config struct {
	TrustDomain identity.TrustDomain // required; must be the state's
	Now         func() time.Time     // nil means time.Now
	Log         *slog.Logger         // nil means no log
}

// Upstream is a root that can sign. It is immutable and safe for concurrent use;
// any number of programs may have one root open.
//
// The key is read for each signature and not kept: a process that speaks to the
// network needs it every 36 h by default, and has nothing of it to lose in
// between.
type Upstream struct {
	td   identity.TrustDomain
	dir  string
	root *x509.Certificate
	sum  string // of the key's file, by the manifest
	now  func() time.Time
}

// Open reads the root in dir. It changes nothing there but the marker and the
// copy of the certificate, if a crash of Init has kept them from being made.
//
// Errors: [*NotInitializedError], [*LostError], [*CorruptError],
// [*VersionError], [*TrustDomainError], [*PermissionError], or what the
// filesystem says.
func Open(dir string, c Config) (*Upstream, error) { return open(osDisk{}, dir, c) }

func open(d disk, dir string, c Config) (*Upstream, error) {
	if c.TrustDomain.IsZero() {
		return nil, errors.New("opening a state directory: no trust domain is given")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := checkPlace(dir); err != nil {
		return nil, err
	}
	u := &Upstream{td: c.TrustDomain, dir: dir, now: c.Now}
	if err := u.read(); err != nil {
		return nil, err
	}
	if err := u.checkMarks(d, dir, c.Log); err != nil {
		return nil, err
	}
	return u, nil
}

// checkPlace tells a root that was never made from one that is lost.
func checkPlace(dir string) error {
	if err := checkPrivate(dir, fs.ModeDir|0o700); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return &NotInitializedError{Dir: dir}
		}
		return err
	}
	authority := filepath.Join(dir, authorityName)
	err := checkPrivate(authority, fs.ModeDir|0o700)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return lostOrNever(dir)
}

// read loads the folder authority, and believes nothing of it that the manifest
// does not vouch for.
func (u *Upstream) read() error {
	m, err := readManifest(u.dir)
	if err != nil {
		return err
	}
	if m.TrustDomain != u.td.String() {
		return &TrustDomainError{Dir: u.dir, Held: m.TrustDomain, Want: u.td}
	}
	path := filepath.Join(u.dir, authorityName, certName)
	certPEM, err := readPart(u.dir, path, 0o644, m.Certificate)
	if err != nil {
		return err
	}
	if u.root, err = ca.ParseRootCertificate(certPEM, u.td); err != nil {
		return &CorruptError{File: path, Reason: err.Error()}
	}
	u.sum = m.Key
	_, err = u.key()
	return err
}

// key reads the root's key.
func (u *Upstream) key() (crypto.Signer, error) {
	path := filepath.Join(u.dir, authorityName, keyName)
	keyPEM, err := readPart(u.dir, path, 0o600, u.sum)
	if err != nil {
		return nil, err
	}
	defer clear(keyPEM)
	key, err := ca.ParseRootKey(keyPEM, u.root)
	if err != nil {
		return nil, &CorruptError{File: path, Reason: err.Error()}
	}
	return key, nil
}

func readManifest(dir string) (*manifest, error) {
	path := filepath.Join(dir, authorityName, stateName)
	data, err := readPart(dir, path, 0o600, "")
	if err != nil {
		return nil, err
	}
	// The version first, and of it alone: a newer state may look quite different.
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return nil, &CorruptError{File: path, Reason: err.Error()}
	}
	if v.Version > stateVersion {
		return nil, &VersionError{File: path, Have: v.Version, Can: stateVersion}
	}
	var m manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, &CorruptError{File: path, Reason: err.Error()}
	}
	canonical, err := m.marshal()
	if err != nil {
		return nil, err
	}
	if m.Version != stateVersion || !bytes.Equal(data, canonical) {
		return nil, &CorruptError{File: path, Reason: "it is not in the form in which it was written"}
	}
	return &m, nil
}

// readPart reads one file of the folder authority; sum is its checksum, empty
// for the one that nothing vouches for.
func readPart(dir, path string, mode fs.FileMode, sum string) ([]byte, error) {
	err := checkPrivate(path, mode)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &LostError{Dir: dir, File: path}
	}
	if err != nil {
		return nil, err
	}
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	if got := checksum(data); sum != "" && got != sum {
		return nil, &CorruptError{File: path, Reason: fmt.Sprintf("its SHA-256 is %s…, and the manifest says %.8s…", got[:8], sum)}
	}
	return data, nil
}

// checkMarks compares marker and copy with the root, and makes them where they
// are missing. A marker of another root means that the folder was exchanged. The
// copy is no more than that and is put right.
func (u *Upstream) checkMarks(d disk, dir string, log *slog.Logger) error {
	path := filepath.Join(dir, markerName)
	marked, err := readFile(path)
	if err == nil && !bytes.Equal(marked, marker(u.root)) {
		return &CorruptError{File: path, Reason: fmt.Sprintf("it tells of the root %.80q, and the folder holds %.80q", marked, marker(u.root))}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	anchor, anchorErr := readFile(AnchorPath(dir))
	if err == nil && anchorErr == nil && bytes.Equal(anchor, identity.EncodePEM(u.root)) {
		return nil
	}
	unlock, err := lockDir(dir)
	if err == nil {
		err = errors.Join(mark(d, dir, u.root), unlock())
	}
	if err != nil {
		// The root is whole and can sign, on a full or read-only disk too.
		log.Warn("writing the marker and the root certificate beside the state", "dir", dir, "error", err)
	}
	return nil
}

// Root returns the root's certificate.
func (u *Upstream) Root() *x509.Certificate { return u.root }

// rootsSequence is the version of the roots: there is one, and it never changes.
const rootsSequence = 1

// SignIntermediate implements [ca.Upstream].
func (u *Upstream) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	r := ca.Root{TrustDomain: u.td, Certificate: u.root, Key: u.key, Now: u.now}
	cert, err := r.Sign(ctx, req)
	if err != nil {
		return nil, err
	}
	return &ca.Signed{
		Chain: []*x509.Certificate{cert}, Roots: []*x509.Certificate{u.root}, Sequence: rootsSequence,
	}, nil
}
