package events

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
)

// newWriter makes a writer for an API server that answers as told. What a real one
// makes of events is tested in test/interop/kubepolicy.
func newWriter(t *testing.T, answer http.HandlerFunc, now func() time.Time) *Writer {
	t.Helper()
	s := httptest.NewServer(answer)
	t.Cleanup(s.Close)
	c, err := dynamic.NewForConfigAndClient(&rest.Config{Host: s.URL, QPS: -1}, s.Client())
	if err != nil {
		t.Fatal(err)
	}
	w, err := New(Config{Client: c, Instance: "meshca-0", Now: now, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func accept(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprint(w, `{"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "x"}}`)
}

func (w *Writer) count(result string) int {
	var m dto.Metric
	if err := w.written.WithLabelValues(result).Write(&m); err != nil {
		panic(err)
	}
	return int(m.GetCounter().GetValue())
}

// drain handles what waits.
func (w *Writer) drain(t *testing.T) {
	t.Helper()
	for {
		k, times, ok := w.next()
		if !ok {
			return
		}
		if err := w.handle(t.Context(), k, times); err != nil {
			t.Fatal(err)
		}
	}
}

// Whoever has something to say is not held up and does not grow what is kept, even
// where nobody writes; and it is counted what was dropped.
func TestV12_QueueIsBounded(t *testing.T) {
	w := newWriter(t, accept, time.Now)
	for i := range 3 * maxQueue {
		w.Refused("shop", "cart", fmt.Sprint(i), "no")
		w.Refused("shop", "cart", "0", "no") // is there already
	}
	if len(w.queue) != maxQueue || len(w.waits) != maxQueue || w.count(resultFull) != 2*maxQueue {
		t.Errorf("%d wait, %d were dropped", len(w.queue), w.count(resultFull))
	}
}

// What is remembered of objects and events is bounded too.
func TestV12_MemoryIsBounded(t *testing.T) {
	now := time.Now()
	w := newWriter(t, accept, func() time.Time { return now })
	w.global.SetLimit(1e9)
	for i := range maxSeries + 200 {
		w.Refused("shop", "cart", fmt.Sprint(i), "no")
		if i%500 == 499 {
			w.drain(t)
		}
	}
	w.drain(t)
	if len(w.series) > maxSeries || len(w.known) > maxKnown || w.count(resultWritten) != maxSeries+200 {
		t.Errorf("%d events and %d objects are remembered, %d were written", len(w.series), len(w.known), w.count(resultWritten))
	}
}

// One object has a few events at once and then one each minute; others have theirs.
func TestEachObjectHasItsRate(t *testing.T) {
	now := time.Now()
	w := newWriter(t, accept, func() time.Time { return now })
	say := func(pod string, n int) {
		for i := range n {
			w.Refused("shop", pod, pod, fmt.Sprint(now, i))
		}
		w.drain(t)
	}
	say("cart", 2*objects)
	say("pay", 1)
	if w.count(resultWritten) != objects+1 || w.count(resultOften) != objects {
		t.Errorf("%d written, %d too often", w.count(resultWritten), w.count(resultOften))
	}
	now = now.Add(refill)
	say("cart", 2)
	if w.count(resultWritten) != objects+2 {
		t.Errorf("after %v: %d written", refill, w.count(resultWritten))
	}
}

// The same is one event, whose count is written once a minute, and that is begun anew
// before the API server forgets it.
func TestTheSameIsCounted(t *testing.T) {
	var requests []string
	now := time.Now()
	w := newWriter(t, func(rw http.ResponseWriter, r *http.Request) {
		requests = append(requests, r.Method)
		accept(rw, r)
	}, func() time.Time { return now })
	for _, tt := range []struct {
		after time.Duration
		times int
		want  string
	}{
		{0, 3, "[POST]"},
		{again / 2, 5, "[POST]"},
		{again / 2, 1, "[POST PATCH]"},
		{again / 2, 1, "[POST PATCH]"},
		{lifetime, 1, "[POST PATCH POST]"},
	} {
		now = now.Add(tt.after)
		for range tt.times {
			w.Refused("shop", "cart", "uid", "no")
		}
		w.drain(t)
		if got := fmt.Sprint(requests); got != tt.want {
			t.Errorf("after %v: %s, want %s", tt.after, got, tt.want)
		}
	}
}

// An event that cannot be written is dropped and counted, and the next one is tried.
func TestTroubleDropsEvents(t *testing.T) {
	w := newWriter(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
	}, time.Now)
	w.Refused("shop", "cart", "uid", "no")
	w.Refused("shop", "pay", "uid2", "no")
	w.drain(t)
	if w.count(resultFailed) != 2 || !strings.Contains(w.said, `the CA may not create events.events.k8s.io in namespace "shop"`) {
		t.Errorf("%d failed: %s", w.count(resultFailed), w.said)
	}
}

func TestT14_NotesAreOneLine(t *testing.T) {
	for in, want := range map[string]string{
		"plain, with ä and “quotes”":  "plain, with ä and “quotes”",
		"a\nb\tc\x00d\x1b[31m\u202ee": `a\nb\tc\x00d\x1b[31m\u202ee`,
		"bad \xff utf-8":              `bad \xff utf-8`,
		"":                            "",
	} {
		if got := clean(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	for _, part := range []string{"x", "ä", "\x00", "\xff", "漢"} {
		got := clean(strings.Repeat(part, 5000))
		if len(got) > maxNote || len(got) < maxNote-16 || !utf8.ValidString(got) || !strings.HasSuffix(got, "…") {
			t.Errorf("%q 5000 times: %d bytes, ends %q", part, len(got), got[len(got)-8:])
		}
	}
}

func TestNamesFit(t *testing.T) {
	at := time.Unix(1, 0)
	for _, name := range []string{"cart", strings.Repeat("a", 253), strings.Repeat("a", 235) + ".-b"} {
		got := nameOf(key{object: object{name: name}}, "meshca-0", at)
		if len(got) > maxName || strings.Contains(got, "-.") || strings.Contains(got, "..") {
			t.Errorf("%q: %q", name, got)
		}
		if got == nameOf(key{object: object{name: name}}, "meshca-1", at) {
			t.Error("two replicas make one name")
		}
	}
}
