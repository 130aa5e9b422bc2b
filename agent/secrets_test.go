package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestV11_TokenIsInNoLogLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var steps atomic.Int64
		r.ca.OnSign = func(_ string, req *signRequest) (*signResponse, error) {
			step := steps.Add(1)
			switch step % 5 {
			case 0:
				return r.ca.Sign(req)
			case 1:
				return nil, errors.New("fault")
			case 2:
				return &signResponse{}, nil
			}
			return nil, status.Error(codes.Code(step%5)+codes.FailedPrecondition, "no")
		}
		r.serve()
		r.run()
		time.Sleep(10 * time.Hour)
		synctest.Wait()
		if steps.Load() < 20 || containsToken(r.log.String()) {
			t.Errorf("after %d calls, the log holds the token or nothing happened", steps.Load())
		}
		if err := os.WriteFile(r.anchor, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		r.cutOff()
		time.Sleep(10 * time.Hour)
		synctest.Wait()
		if containsToken(r.log.String()) || len(r.log.lines("trust anchor file")) == 0 {
			t.Error("the log holds the token, or does not say that the anchor is broken")
		}
	})
}

// After renewals with every kind of key there is no file where a careless
// program would have left one: working directory, temporary directory, home,
// and beside the files that the agent was given.
func TestT4_KeysStayInMemory(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	t.Setenv("TMPDIR", dir)
	t.Setenv("HOME", dir)
	synctest.Test(t, func(t *testing.T) {
		for _, kt := range KeyTypes() {
			r := newRig(t, func(c *Config) { c.KeyType = kt })
			r.serve()
			r.run()
			time.Sleep(2 * time.Hour)
			if r.svid() == nil {
				t.Fatal(r.log.String())
			}
			entries, err := os.ReadDir(filepath.Dir(r.anchor))
			if err != nil || len(entries) != 1 {
				t.Errorf("beside the anchor: %v, %v", entries, err)
			}
		}
	})
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// The packages of the agent hold no call that could write a key, or anything
// else, to a file.
func TestNoCallWritesAFile(t *testing.T) {
	for _, dir := range []string{".", "caclient"} {
		names, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range names {
			if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
				continue
			}
			src, err := os.ReadFile(dir + "/" + e.Name())
			if err != nil {
				t.Fatal(err)
			}
			for _, call := range fileWriters(t, e.Name(), src) {
				t.Errorf("%s/%s: %s", dir, e.Name(), call)
			}
		}
	}
}
