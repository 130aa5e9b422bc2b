package self

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
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
	certs, err := identity.ParsePEM(certPEM)
	if err != nil {
		return &CorruptError{File: path, Reason: err.Error()}
	}
	u.root = certs[0]
	if err := u.checkRoot(len(certs)); err != nil {
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
	key, err := parseKey(keyPEM, u.root)
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

// checkRoot holds a certificate against what Init makes.
func (u *Upstream) checkRoot(count int) error {
	c, id := u.root, u.td.ID().String()
	switch {
	case count != 1:
		return fmt.Errorf("it holds %d certificates", count)
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("it is no CA certificate")
	case len(c.URIs) != 1 || c.URIs[0].String() != id:
		return fmt.Errorf("it is not a certificate of %s", id)
	}
	return c.CheckSignatureFrom(c)
}

func parseKey(data []byte, root *x509.Certificate) (crypto.Signer, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("it is not one PEM block PRIVATE KEY")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		// The parser's text is about structure, but nothing of a key is printed.
		return nil, errors.New("it is no PKCS#8 key")
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("it is a %T, which cannot sign", parsed)
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(root.PublicKey) {
		return nil, errors.New("it is not the key of the root certificate beside it")
	}
	return key, nil
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

// SignIntermediate signs an intermediate over the CSR's key. Subject, names and
// limits are ours, whatever the CSR says. Its life ends with the root's.
func (u *Upstream) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if req.TrustDomain != u.td {
		return nil, fmt.Errorf("signing an intermediate for trust domain %q: this root is of %q", req.TrustDomain, u.td)
	}
	if req.CSR == nil || req.Lifetime <= 0 {
		return nil, errors.New("signing an intermediate: CSR and Lifetime must both be given")
	}
	if err := ca.CheckKey(req.CSR.PublicKey); err != nil {
		return nil, err
	}
	if err := req.CSR.CheckSignature(); err != nil {
		return nil, fmt.Errorf("signing an intermediate: the CSR is not signed with its own key: %w", err)
	}
	now := u.now().Round(0).UTC().Truncate(time.Second)
	if now.Before(u.root.NotBefore) || !now.Before(u.root.NotAfter) {
		return nil, fmt.Errorf("signing an intermediate: this clock shows %s, and the root holds from %s to %s; correct the clock, or make a new root",
			now.Format(time.RFC3339), u.root.NotBefore.Format(time.RFC3339), u.root.NotAfter.Format(time.RFC3339))
	}
	template, err := u.template(req, now)
	if err != nil {
		return nil, err
	}
	key, err := u.key()
	if err != nil {
		return nil, fmt.Errorf("signing an intermediate: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, u.root, req.CSR.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("signing an intermediate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading back an intermediate: %w", err)
	}
	return &ca.Signed{
		Chain: []*x509.Certificate{cert}, Roots: []*x509.Certificate{u.root}, Sequence: rootsSequence,
	}, nil
}

func (u *Upstream) template(req ca.IntermediateRequest, now time.Time) (*x509.Certificate, error) {
	name, id, err := ca.AuthorityName(u.td, ca.RoleIntermediate, req.CSR.PublicKey)
	if err != nil {
		return nil, err
	}
	serial, err := ca.NewSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               name,
		URIs:                  []*url.URL{u.td.ID().SPIFFE().URL()},
		NotBefore:             now.Add(-ca.Backdate),
		NotAfter:              now.Add(req.Lifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		SubjectKeyId:          id,
	}
	if t.NotBefore.Before(u.root.NotBefore) {
		t.NotBefore = u.root.NotBefore
	}
	if t.NotAfter.After(u.root.NotAfter) {
		t.NotAfter = u.root.NotAfter
	}
	return t, nil
}
