package ca_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/ca/self"
	"github.com/meshca/meshca/identity/identitytest"
)

// In a child process, stopAt says where the authority is to stop and wait for
// its end, and stopDir which state directory it has.
const (
	stopAt  = "MESHCA_TEST_STOP_AT"
	stopDir = "MESHCA_TEST_STATE"
)

// stopping is an upstream that tells the parent and then hangs.
type stopping struct {
	real  ca.Upstream
	after bool // it has signed, and its answer is never read
}

func (s stopping) SignIntermediate(ctx context.Context, req ca.IntermediateRequest) (*ca.Signed, error) {
	if s.after {
		if _, err := s.real.SignIntermediate(ctx, req); err != nil {
			return nil, err
		}
	}
	announce()
	select {}
}

func announce() { fmt.Println("\nstopped") }

// TestChildOfKill is the child; without a parent it has nothing to do.
func TestChildOfKill(t *testing.T) {
	at := os.Getenv(stopAt)
	if at == "" {
		return
	}
	td := identitytest.TrustDomain(t, "cluster.local")
	real, err := self.Open(os.Getenv(stopDir), self.Config{TrustDomain: td})
	check(t, err)
	r, up := &trail{}, ca.Upstream(real)
	switch at {
	case "before asking": // the key is made, the CSR not sent
		up = stopping{real: real}
	case "before the answer":
		up = stopping{real: real, after: true}
	case "before the proof": // the certificate is here, nothing is verified
		r.hook = func(e ca.Event) {
			if e.Kind == ca.KindIntermediate && e.Stage == ca.Done {
				announce()
				select {}
			}
		}
	}
	a, err := ca.New(ca.Config{TrustDomain: td, Upstream: up, Audit: r})
	check(t, err)
	check(t, a.Run(t.Context()))
}

// The authority is killed while it takes up an intermediate. It keeps nothing
// of one outside its memory, so the state is what it was, and the next process
// signs under the same root.
func TestF1_F2_F3_KillWhileTakingUpAnIntermediate(t *testing.T) {
	k := catest.New(t)
	before := tree(t, k.Dir)
	for _, at := range []string{"before asking", "before the answer", "before the proof"} {
		child := exec.Command(os.Args[0], "-test.run=^TestChildOfKill$")
		child.Env = append(os.Environ(), stopAt+"="+at, stopDir+"="+k.Dir)
		out, err := child.StdoutPipe()
		check(t, err)
		check(t, child.Start())
		lines := bufio.NewScanner(out)
		stopped := false
		for !stopped && lines.Scan() {
			stopped = lines.Text() == "stopped"
		}
		check(t, child.Process.Kill())
		_ = child.Wait() // it was killed
		if !stopped {
			t.Fatalf("%s: the child ended by itself", at)
		}
		if after := tree(t, k.Dir); after != before {
			t.Errorf("%s: the state has changed", at)
		}
		again, err := self.Open(k.Dir, self.Config{TrustDomain: k.TrustDomain})
		check(t, err)
		a, err := ca.New(ca.Config{TrustDomain: k.TrustDomain, Upstream: again, Audit: &trail{}})
		check(t, err)
		_, changed := a.Bundle()
		start(t, a)
		<-changed
		issued, err := a.Issue(t.Context(), k.Caller(t, "shop", "cart"), catest.NewKey(t).Public(), 0)
		check(t, err)
		if !issued.Bundle.Authorities()[0].Equal(k.Upstream.Root()) {
			t.Errorf("%s: another root", at)
		}
	}
}

// tree is a checksum over a folder: names, modes and contents.
func tree(t testing.TB, dir string) string {
	t.Helper()
	sum := sha256.New()
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		fmt.Fprintf(sum, "%s %v %q\n", path, info.Mode(), data)
		return err
	}))
	return fmt.Sprintf("%x", sum.Sum(nil))
}
