package logs

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// parse reads a log of JSON lines.
func parse(t *testing.T, log string) []map[string]any {
	t.Helper()
	var lines []map[string]any
	for line := range strings.Lines(log) {
		var parsed map[string]any
		if err := json.Unmarshal([]byte(line), &parsed); err != nil {
			t.Fatalf("line %.80q is not JSON: %v", line, err)
		}
		lines = append(lines, parsed)
	}
	return lines
}

func TestT14_EveryLineIsOneJSONObject(t *testing.T) {
	var out bytes.Buffer
	log, flush, err := New(&out, Auto, "info")
	if err != nil {
		t.Fatal(err)
	}
	evil := []string{"a\nb", "\x00\x1b[31m", `"}{"`, "\u2028", strings.Repeat("x", 1<<16), "\xff\xfe"}
	for _, text := range evil {
		log.Info("peer said", "text", text)
	}
	flush()
	if n := len(parse(t, out.String())); n != len(evil) {
		t.Errorf("%d lines for %d records", n, len(evil))
	}
}

func TestRefusesUnknownChoices(t *testing.T) {
	if _, _, err := New(io.Discard, "xml", "info"); err == nil || !strings.Contains(err.Error(), "auto, text or json") {
		t.Errorf("format xml: %v", err)
	}
	if _, _, err := New(io.Discard, "json", "loud"); err == nil || !strings.Contains(err.Error(), "debug, info, warn or error") {
		t.Errorf("level loud: %v", err)
	}
}

// One kind of line, however often it is provoked, leaves the log readable and
// the others alone.
func TestL9_OneKindOfLineCannotFloodTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log, flush, err := New(&out, JSON, "info")
		if err != nil {
			t.Fatal(err)
		}
		for i := range 50_000 {
			log.Warn("refused", "code", "Unauthenticated", "ref", i)
			if i%1000 == 0 {
				log.Warn("refused", "code", "InvalidArgument", "ref", i)
				synctest.Wait() // the queue's reader keeps up; it is not what is tested
			}
		}
		time.Sleep(time.Second)
		log.Warn("refused", "code", "Unauthenticated")
		log.Info("something else")
		flush()
		counts := map[string]int{}
		var suppressed float64
		for _, l := range parse(t, out.String()) {
			counts[fmt.Sprint(l["msg"], l["code"])]++
			if s, ok := l["suppressed"].(float64); ok {
				suppressed += s
			}
		}
		if n := counts["refusedUnauthenticated"]; n != burst+1 {
			t.Errorf("%d lines of the flood; want %d and one a second later", n, burst)
		}
		if counts["refusedInvalidArgument"] != 50 || counts["something else<nil>"] != 1 {
			t.Errorf("other kinds were held back too: %v", counts)
		}
		if suppressed != 50_000-burst {
			t.Errorf("%v lines are said to be suppressed; want %d", suppressed, 50_000-burst)
		}
	})
}

func TestL9_KindsAreBounded(t *testing.T) {
	h := newLimited(nil)
	for i := range 10 * maxKinds {
		h.take(kind{msg: fmt.Sprint(i)})
	}
	if n := len(h.kinds); n > maxKinds+1 {
		t.Errorf("%d kinds are remembered; want at most %d", n, maxKinds+1)
	}
}

// stuck is a log that nobody reads, until it is released.
type stuck struct{ release chan struct{} }

func (s stuck) Write(p []byte) (int, error) {
	<-s.release
	return len(p), nil
}

// Whoever logs goes on although the log is stuck.
func TestF66_AStuckLogStopsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := stuck{make(chan struct{})}
		q := newQueue(s)
		log := slog.New(slog.NewJSONHandler(q, nil))
		for range 3 * queueLines {
			log.Info("a line") // would deadlock the bubble if it waited
		}
		q.close() // gives up after its patience
		close(s.release)
	})
}

func TestDroppedLinesAreCounted(t *testing.T) {
	var out bytes.Buffer
	release := make(chan struct{})
	q := newQueue(writerFunc(func(p []byte) (int, error) { <-release; return out.Write(p) }))
	for range queueLines + 100 {
		_, _ = q.Write([]byte("{}\n"))
	}
	close(release)
	q.close()
	found := false
	for _, l := range parse(t, out.String()) {
		if n, ok := l["lines"].(float64); ok && n >= 99 {
			found = true
		}
	}
	if !found {
		t.Error("no line tells how many were dropped")
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
