package self

import (
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity/identitytest"
)

// parentSyncs notes which folders are synced.
type parentSyncs struct {
	osDisk
	synced []string
}

func (d *parentSyncs) syncDir(path string) error {
	d.synced = append(d.synced, path)
	return d.osDisk.syncDir(path)
}

// A directory that somebody made a moment ago is no safer from a power cut than
// one that Init makes, and a trailing slash changes nothing about its parent.
func TestF5_TheDirectoryItselfIsSynced(t *testing.T) {
	for name, prepare := range map[string]func(string) error{
		"made by Init": func(string) error { return nil },
		"there before": func(dir string) error { return os.Mkdir(dir, 0o700) },
	} {
		for _, suffix := range []string{"", "/"} {
			t.Run(name+suffix, func(t *testing.T) {
				parent := t.TempDir()
				dir := filepath.Join(parent, "state")
				if err := prepare(dir); err != nil {
					t.Fatal(err)
				}
				d := &parentSyncs{}
				if _, err := initialize(d, dir+suffix, InitConfig{TrustDomain: td(t)}); err != nil {
					t.Fatal(err)
				}
				if !slices.Contains(d.synced, parent) {
					t.Errorf("synced %q; the parent %q is not among them", d.synced, parent)
				}
			})
		}
	}
}

// The key is on the disk and in no process that does not sign just now: without
// the file there is no signature, and with it there is one again.
func TestT4_RootKeyIsReadForEachSignature(t *testing.T) {
	dir := newState(t)
	u := reopen(t, dir)
	key := filepath.Join(dir, authorityName, keyName)
	if err := os.Rename(key, key+".away"); err != nil {
		t.Fatal(err)
	}
	var lost *LostError
	if _, err := u.SignIntermediate(t.Context(), intermediateRequest(t)); !errors.As(err, &lost) {
		t.Errorf("signing without the key file: %v; want *LostError", err)
	}
	if err := os.Rename(key+".away", key); err != nil {
		t.Fatal(err)
	}
	if _, err := u.SignIntermediate(t.Context(), intermediateRequest(t)); err != nil {
		t.Errorf("signing with the key file back: %v", err)
	}
}

func intermediateRequest(t *testing.T) ca.IntermediateRequest {
	return ca.IntermediateRequest{
		CSR:         csr(t, &x509.CertificateRequest{}, identitytest.NewKey(t)),
		TrustDomain: td(t), Lifetime: time.Hour,
	}
}
