package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/ca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var event = ca.Event{
	Time: time.Date(2026, 3, 1, 12, 0, 0, 5e8, time.FixedZone("", 3600)), Stage: ca.Intent, Kind: ca.KindSVID,
	SPIFFEID: "spiffe://cluster.local/ns/shop/sa/cart", Serial: "1f", Authority: "ab", Key: "cd",
	Lifetime: time.Hour, NotAfter: time.Date(2026, 3, 1, 13, 0, 0, 0, time.UTC),
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLineOfARecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(path, nil)
	check(t, err)
	check(t, l.Record(t.Context(), event))
	failed := event
	failed.Stage, failed.Err = ca.Failed, errors.New("no such key")
	check(t, l.Record(t.Context(), failed))
	check(t, l.Close())
	got, err := os.ReadFile(path)
	check(t, err)
	const common = `"kind":"svid","spiffe_id":"spiffe://cluster.local/ns/shop/sa/cart","serial":"1f","authority":"ab","key_sha256":"cd","lifetime_seconds":3600,"not_after":"2026-03-01T13:00:00Z"`
	want := `{"time":"2026-03-01T11:00:00.5Z","stage":"intent",` + common + "}\n" +
		`{"time":"2026-03-01T11:00:00.5Z","stage":"failed",` + common + `,"error":"no such key"}` + "\n"
	if string(got) != want {
		t.Errorf("lines\n%swant\n%s", got, want)
	}
	info, err := os.Stat(path)
	check(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the file has mode %v", info.Mode())
	}
	// Opening it again goes on at its end.
	l, err = Open(path, nil)
	check(t, err)
	check(t, l.Record(t.Context(), event))
	check(t, l.Close())
	if got, _ := os.ReadFile(path); bytes.Count(got, []byte("\n")) != 3 {
		t.Errorf("after another record:\n%s", got)
	}
}

type memory struct {
	bytes.Buffer
	closed bool
}

func (m *memory) Close() error { m.closed = true; return nil }

func newLog(t testing.TB, sink *memory) *Log {
	t.Helper()
	l, err := New("memory", sink, nil)
	check(t, err)
	return l
}

func TestLinesStayWholeUnderConcurrency(t *testing.T) {
	var sink memory
	l := newLog(t, &sink)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				if err := l.Record(context.Background(), event); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	lines := strings.Split(strings.TrimSuffix(sink.String(), "\n"), "\n")
	if len(lines) != 800 {
		t.Fatalf("%d lines", len(lines))
	}
	for _, line := range lines {
		if line != lines[0] {
			t.Fatalf("line %q", line)
		}
	}
}

// F66 with a real FIFO: its reader stops reading, and the pipe fills up.
func TestF66_StuckSinkStopsSigningAndHeals(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	check(t, syscall.Mkfifo(path, 0o600))
	if _, err := Open(path, nil); err == nil || !strings.Contains(err.Error(), "nobody reads") {
		t.Fatalf("opening a FIFO without a reader: %v", err)
	}
	reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	check(t, err)
	defer reader.Close()
	l, err := Open(path, nil)
	check(t, err)
	defer l.Close()

	var blocked *BlockedError
	written := 0
	for ; blocked == nil && written < 10_000; written++ {
		if err := l.Record(t.Context(), event); err != nil && !errors.As(err, &blocked) {
			t.Fatal(err)
		}
	}
	if blocked == nil || blocked.Sink != path {
		t.Fatalf("after %d records that nobody reads: %v", written, blocked)
	}
	// From now on each is refused at once, without a goroutine of its own.
	goroutines := runtime.NumGoroutine()
	for range 1000 {
		if err := l.Record(t.Context(), event); !errors.As(err, &blocked) {
			t.Fatalf("while the sink is stuck: %v", err)
		}
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines more than before", n-goroutines)
	}
	idle := func() bool { l.mu.Lock(); defer l.mu.Unlock(); return !l.writing }
	if idle() {
		t.Error("the writer has gone although its write has not returned")
	}
	// Somebody reads again: what was stuck goes through, and records count again.
	buf := make([]byte, 1<<20)
	_, err = reader.Read(buf)
	check(t, err)
	for !idle() { // until the stuck write has returned
		runtime.Gosched()
	}
	check(t, l.Record(t.Context(), event))
}

// gate is a sink whose writes wait.
type gate struct {
	memory
	open chan struct{}
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	return g.memory.Write(p)
}

func TestF66_PatienceIsOneSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{})}
		l, err := New("gate", g, nil)
		check(t, err)
		began := time.Now()
		var wg sync.WaitGroup
		record := func() {
			var blocked *BlockedError
			if err := l.Record(context.Background(), event); !errors.As(err, &blocked) || !blocked.Since.Equal(began) {
				t.Errorf("error %v", err)
			}
		}
		wg.Go(record)
		synctest.Wait() // its write hangs
		for range 49 {  // and these wait for the next one
			wg.Go(record)
		}
		wg.Wait()
		if d := time.Since(began); d != time.Second {
			t.Errorf("callers waited %v", d)
		}
		if err := l.Record(t.Context(), event); err == nil || time.Since(began) != time.Second {
			t.Errorf("the next caller: %v after %v", err, time.Since(began))
		}
		close(g.open)
		synctest.Wait()
		check(t, l.Record(t.Context(), event))
		if n := strings.Count(g.String(), "\n"); n != 2 {
			t.Errorf("%d lines, want the late one and the last", n)
		}
	})
}

func TestRecordEndsWithItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{})}
		l, err := New("gate", g, nil)
		check(t, err)
		var wg sync.WaitGroup
		wg.Go(func() { _ = l.Record(context.Background(), event) })
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := l.Record(ctx, event); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
		close(g.open)
		wg.Wait()
	})
}

// F37: a full disk. /dev/full answers every write with ENOSPC.
func TestF37_FullDiskStopsSigning(t *testing.T) {
	l, err := Open("/dev/full", nil)
	check(t, err)
	for range 3 {
		if err := l.Record(t.Context(), event); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "/dev/full") {
			t.Errorf("error %v", err)
		}
	}
	check(t, l.Close())
	if err := l.Record(t.Context(), event); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// half is a sink that takes half of the first write.
type half struct {
	memory
	failed bool
}

func (h *half) Write(p []byte) (int, error) {
	if h.failed {
		return h.memory.Write(p)
	}
	h.failed = true
	n, _ := h.memory.Write(p[:len(p)/2])
	return n, syscall.ENOSPC
}

func TestF37_TornLineDoesNotSpoilTheNext(t *testing.T) {
	sink := &half{}
	l, err := New("half", sink, nil)
	check(t, err)
	if err := l.Record(t.Context(), event); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	check(t, l.Record(t.Context(), event))
	lines := strings.Split(sink.String(), "\n")
	if len(lines) != 3 || !json.Valid([]byte(lines[1])) {
		t.Errorf("lines %q", lines)
	}
}

var nasty = []string{
	"a\nb", "{\"stage\":\"done\"}\n", "\x00\x1b[31m", "\xff\xfe", "\u2028\u2029", `"\`, strings.Repeat("é", 4096), "</script>",
}

func TestT14_NothingBreaksOutOfALine(t *testing.T) {
	for _, text := range nasty {
		e := event
		e.Err, e.Names = errors.New(text), []string{text}
		checkLine(t, e, text)
	}
}

func FuzzLine(f *testing.F) {
	for _, text := range nasty {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e := event
		e.Err, e.Names, e.SPIFFEID, e.Serial = errors.New(text), []string{text}, text, text
		checkLine(t, e, text)
	})
}

func checkLine(t *testing.T, e ca.Event, text string) {
	t.Helper()
	line := encode(&e)
	if want := reflected(t, e); !bytes.Equal(line, want) {
		t.Fatalf("line %q, and by encoding/json %q", line, want)
	}
	if bytes.IndexByte(line, '\n') != len(line)-1 || !utf8.Valid(line) || bytes.ContainsFunc(line[:len(line)-1], func(r rune) bool { return r < ' ' }) {
		t.Fatalf("not one clean line: %q", line)
	}
	var got struct {
		Error string
		Names []string
	}
	check(t, json.Unmarshal(line, &got))
	for _, s := range append(got.Names, got.Error) {
		if len(s) > maxText*3+len("…") || len(text) <= maxText && utf8.ValidString(text) && s != text {
			t.Fatalf("%.300q became %.300q", text, s)
		}
	}
}

// reflected is what encoding/json makes of a record.
func reflected(t *testing.T, e ca.Event) []byte {
	t.Helper()
	r := struct {
		Time      time.Time         `json:"time"`
		Stage     ca.Stage          `json:"stage"`
		Kind      ca.Kind           `json:"kind"`
		SPIFFEID  string            `json:"spiffe_id,omitempty"`
		Names     []string          `json:"names,omitempty"`
		Caller    map[string]string `json:"caller,omitempty"`
		Serial    string            `json:"serial,omitempty"`
		Authority string            `json:"authority,omitempty"`
		Key       string            `json:"key_sha256"`
		Lifetime  float64           `json:"lifetime_seconds"`
		NotAfter  *time.Time        `json:"not_after,omitempty"`
		Error     string            `json:"error,omitempty"`
	}{
		Time: e.Time.UTC(), Stage: e.Stage, Kind: e.Kind, SPIFFEID: e.SPIFFEID,
		Serial: e.Serial, Authority: e.Authority, Key: e.Key, Lifetime: e.Lifetime.Seconds(),
	}
	for _, n := range e.Names {
		r.Names = append(r.Names, cut(n))
	}
	if !e.NotAfter.IsZero() {
		end := e.NotAfter.UTC()
		r.NotAfter = &end
	}
	if e.Err != nil {
		r.Error = cut(e.Err.Error())
	}
	if e.Caller != nil {
		r.Caller = make(map[string]string)
		for _, a := range e.Caller.LogValue().Group() {
			if a.Key != "spiffe_id" || a.Value.String() != e.SPIFFEID {
				r.Caller[a.Key] = cut(a.Value.String())
			}
		}
	}
	line, err := json.Marshal(r)
	check(t, err)
	return append(line, '\n')
}

func TestNewNeedsASink(t *testing.T) {
	if _, err := New("none", nil, nil); err == nil {
		t.Error("a trail to nowhere is made")
	}
	if _, err := Open(t.TempDir(), nil); err == nil {
		t.Error("a folder is taken for a sink")
	}
}

// slow is a sink that counts its writes, each of which takes a while.
type slow struct {
	memory
	writes int
}

func (s *slow) Write(p []byte) (int, error) {
	s.writes++
	<-time.After(time.Millisecond)
	return s.memory.Write(p)
}

// What comes during a write shares the next one, up to a bound.
func TestRecordsShareWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sink := &slow{}
		l, err := New("slow", sink, nil)
		check(t, err)
		var wg sync.WaitGroup
		record := func() { check(t, l.Record(context.Background(), event)) }
		wg.Go(record)
		synctest.Wait() // it is being written
		for range maxBatch + 1 {
			wg.Go(record)
		}
		wg.Wait()
		if n := strings.Count(sink.String(), "\n"); n != maxBatch+2 || sink.writes != 3 {
			t.Errorf("%d lines in %d writes", n, sink.writes)
		}
	})
}

// A write of several that fails has failed for each of them.
func TestF37_SharedWriteFailsForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{})}
		l, err := New("gate", g, nil)
		check(t, err)
		var wg sync.WaitGroup
		failed := make(chan error, 2)
		wg.Go(func() { check(t, l.Record(context.Background(), event)) })
		synctest.Wait()
		l.sink = &half{} // takes the next write
		for range 2 {
			wg.Go(func() { failed <- l.Record(context.Background(), event) })
		}
		synctest.Wait()
		close(g.open)
		wg.Wait()
		for range 2 {
			if err := <-failed; !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("error %v", err)
			}
		}
	})
}

func BenchmarkRecordParallel(b *testing.B) {
	l, err := Open(filepath.Join(b.TempDir(), "audit"), nil)
	check(b, err)
	defer l.Close()
	b.ReportAllocs()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			check(b, l.Record(context.Background(), event))
		}
	})
}

func BenchmarkRecord(b *testing.B) {
	l, err := Open(filepath.Join(b.TempDir(), "audit"), nil)
	check(b, err)
	defer l.Close()
	b.ReportAllocs()
	for b.Loop() {
		if err := l.Record(b.Context(), event); err != nil {
			b.Fatal(fmt.Errorf("record: %w", err))
		}
	}
}
