package csi

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/meshca/meshca/identity"
)

const (
	entryVersion = 1
	entrySuffix  = ".json"
	asideSuffix  = ".corrupt"
	newPrefix    = ".new-"
	lockName     = "lock"
	maxEntry     = 64 << 10

	// lockInterval is how soon a successor notices that its predecessor has
	// ended; clients should wait for less than a second.
	lockInterval = 50 * time.Millisecond

	tmpfsMagic = 0x01021994
	ramfsMagic = 0x858458f6
)

// entry is what is kept of a volume. The token in it is worth as much as the pod
// for as long as it is valid: the folder is for its owner alone, and in memory.
type entry struct {
	Version        int    `json:"version"`
	Volume         string `json:"volume"`
	Target         string `json:"target"`
	Namespace      string `json:"namespace"`
	Pod            string `json:"pod"`
	PodUID         string `json:"pod_uid"`
	ServiceAccount string `json:"service_account"`
	Token          string `json:"token"`
	// Published says that the kubelet was told that the volume is there.
	Published bool `json:"published"`
	// Made says that the folder was not there before, and is ours to remove.
	Made bool `json:"made"`
}

// StateError says that the folder of the volumes' state cannot be used.
type StateError struct {
	Dir string
	Err error
}

func (e *StateError) Error() string {
	return fmt.Sprintf("keeping volumes in %q: %v", e.Dir, e.Err)
}

func (e *StateError) Unwrap() error { return e.Err }

// store is the folder of entries, a file for each volume.
type store struct {
	root *os.Root
	lock *os.File
	log  *slog.Logger
}

// openStore opens the folder, makes it if it is not there, and waits until no
// other agent has it: a successor takes over the sockets when its predecessor
// has let go of all of them.
func openStore(ctx context.Context, dir string, diskAllowed bool, log *slog.Logger) (_ *store, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &store{root: root, log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if err := s.check(diskAllowed); err != nil {
		return nil, err
	}
	if s.lock, err = root.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	return s, s.acquire(ctx)
}

// check refuses a folder that others can read, or that outlives a power cut.
func (s *store) check(diskAllowed bool) error {
	info, err := s.root.Stat(".")
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("others than its owner can get into it (mode %v), and it holds the tokens of pods; make its mode 0700", info.Mode().Perm())
	}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok && int(sys.Uid) != os.Geteuid() {
		return fmt.Errorf("it belongs to uid %d, and this is uid %d; it holds the tokens of pods and must be ours alone", sys.Uid, os.Geteuid())
	}
	dir, err := s.root.Open(".")
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	var about syscall.Statfs_t
	if err := syscall.Fstatfs(int(dir.Fd()), &about); err != nil {
		return fmt.Errorf("finding out on what it is: %w", err)
	}
	if kind := uint32(about.Type); kind != tmpfsMagic && kind != ramfsMagic && !diskAllowed {
		return fmt.Errorf("it is not in memory (file system type %#x), and tokens of pods do not belong on a disk; choose a folder on a tmpfs, such as one below /run", kind)
	}
	return nil
}

func (s *store) acquire(ctx context.Context) error {
	ticker := time.NewTicker(lockInterval)
	defer ticker.Stop()
	for said := false; ; {
		err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, syscall.EINTR):
			continue
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return fmt.Errorf("locking it: %w", err)
		case !said:
			s.log.Info("waiting for the agent that serves this node's volumes to end", "folder", s.root.Name())
			said = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

func (s *store) close() error {
	err := s.root.Close()
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close()) // which gives the lock back
	}
	return err
}

// entryName is a file's name for a volume: IDs are the kubelet's, and need not
// be fit for one.
func entryName(volume string) string {
	return fmt.Sprintf("%x%s", sha256.Sum256([]byte(volume)), entrySuffix)
}

// save writes an entry: the old one is there, or the new one, whenever the
// process or the machine ends.
func (s *store) save(e entry) error {
	e.Version = entryVersion
	data, err := json.Marshal(e)
	if err != nil {
		return err
	}
	half := newPrefix + rand.Text()[:12]
	if err := s.write(half, data); err != nil {
		return errors.Join(err, s.removeName(half))
	}
	if err := s.root.Rename(half, entryName(e.Volume)); err != nil {
		return errors.Join(err, s.removeName(half))
	}
	return s.sync()
}

func (s *store) write(name string, data []byte) error {
	f, err := s.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (s *store) sync() error {
	dir, err := s.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// remove forgets a volume; one that is not known is no error.
func (s *store) remove(volume string) error {
	if err := s.removeName(entryName(volume)); err != nil {
		return err
	}
	return s.sync()
}

func (s *store) removeName(name string) error {
	if err := s.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// load returns all entries that can be read. One that cannot is set aside and
// named in the log: it must keep no other pod from its socket.
func (s *store) load() ([]entry, error) {
	dir, err := s.root.Open(".")
	if err != nil {
		return nil, err
	}
	names, err := dir.Readdirnames(-1)
	_ = dir.Close() // it was only read
	if err != nil {
		return nil, err
	}
	var entries []entry
	for _, name := range names {
		switch {
		case strings.HasPrefix(name, newPrefix), strings.HasSuffix(name, entrySuffix+asideSuffix):
			_ = s.removeName(name) // half-written, or looked at long enough; nobody misses it
		case strings.HasSuffix(name, entrySuffix):
			e, err := s.read(name)
			if err != nil {
				s.setAside(name, err)
				continue
			}
			entries = append(entries, e)
		}
	}
	return entries, nil
}

// read reads one entry. Its errors hold no token.
func (s *store) read(name string) (entry, error) {
	f, err := s.root.Open(name)
	if err != nil {
		return entry{}, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxEntry+1))
	if err != nil {
		return entry{}, err
	}
	return parseEntry(name, data)
}

// parseEntry reads what stands in the file of that name.
func parseEntry(name string, data []byte) (entry, error) {
	var e entry
	switch {
	case len(data) > maxEntry:
		return entry{}, fmt.Errorf("it has more than %d bytes", maxEntry)
	case json.Unmarshal(data, &e) != nil:
		return entry{}, errors.New("it is not the JSON of a volume")
	case e.Version != entryVersion:
		return entry{}, fmt.Errorf("it is of version %d; this agent reads version %d", e.Version, entryVersion)
	case entryName(e.Volume) != name:
		return entry{}, errors.New("it is another volume's than its name says")
	}
	return e, nil
}

// setAside keeps an entry that cannot be used for whoever looks for the reason.
//
// There may be a token in it, which is blanked wherever it is: what looks like one
// is not kept. The next process removes the file.
func (s *store) setAside(name string, why error) {
	aside := name + asideSuffix
	err := s.root.Rename(name, aside)
	if err == nil {
		err = s.blank(aside)
	}
	s.log.Error("a volume's entry cannot be used and is set aside; the kubelet brings the volume back within two minutes",
		"file", fmt.Sprintf("%.128q", aside), "folder", s.root.Name(), "reason", why.Error(), "renamed", err == nil)
}

// tokenText is what a token looks like in an entry that may be half of one.
var tokenText = regexp.MustCompile(`eyJ[A-Za-z0-9_.-]*`)

// blank writes a file anew without the tokens in it. A file that is too large to
// be an entry, or that cannot be written, is removed.
func (s *store) blank(name string) error {
	f, err := s.root.Open(name)
	if err != nil {
		return err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxEntry+1))
	_ = f.Close() // it was only read
	half := newPrefix + rand.Text()[:12]
	switch {
	case err != nil:
	case len(data) > maxEntry:
		data = []byte("it was too large")
		fallthrough
	default:
		err = s.write(half, tokenText.ReplaceAll(data, []byte("blanked")))
	}
	if err == nil {
		err = s.root.Rename(half, name)
	}
	if err != nil {
		return errors.Join(err, s.removeName(half), s.removeName(name))
	}
	return nil
}

// claim checks an entry as a request is checked.
func (e *entry) claim(td identity.TrustDomain, pods pods) (*claim, error) {
	c, err := newClaim(td, pods, e.Volume, e.Target, e.Namespace, e.Pod, e.PodUID, e.ServiceAccount)
	if err != nil {
		return nil, err
	}
	return c, matchToken(c, e.Token)
}
