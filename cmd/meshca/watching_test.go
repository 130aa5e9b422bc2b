package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"
)

// A command that is over within a second says nothing of what it awaits; another one
// says each thing once.
func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		p := newProgress(t.Context(), &b, "reading")
		time.Sleep(900 * time.Millisecond)
		p.stop()
		if b.Len() > 0 {
			t.Errorf("said after 0.9 s: %s", b.String())
		}
		p = newProgress(t.Context(), &b, "reading")
		time.Sleep(3500 * time.Millisecond)
		p.say("reading pods: %d so far", 500)
		time.Sleep(3500 * time.Millisecond)
		p.stop()
		if got := b.String(); got != "reading\nreading pods: 500 so far\n" {
			t.Errorf("%q", got)
		}
	})
}

// What is written in the cluster is judged by the API server's clock.
func TestTheAPIServersClock(t *testing.T) {
	then := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", then.Format(http.TimeFormat))
	}))
	defer server.Close()
	a := &api{}
	if d := time.Since(a.now()).Abs(); d > time.Minute {
		t.Errorf("before it has answered, it is off by %v", d)
	}
	client := &http.Client{Transport: &dated{server.Client().Transport, a}}
	resp, err := client.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if d := a.now().Sub(then); d < 0 || d > time.Minute {
		t.Errorf("it is %v after what the API server said", d)
	}
}

func TestMarks(t *testing.T) {
	for locale, utf8 := range map[string]bool{"": false, "C": false, "POSIX": false, "C.UTF-8": true, "de_DE.utf8": true, "en_US.ISO-8859-1": false} {
		if got := marksFor(func(name string) string {
			if name == "LANG" {
				return locale
			}
			return ""
		}); (got.holds == "✓") != utf8 {
			t.Errorf("%q: %v", locale, got)
		}
	}
}
