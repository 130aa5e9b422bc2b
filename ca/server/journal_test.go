package server

import (
	"bytes"
	"context"
	"encoding/json"
	"sync"
	"testing"
	"time"
)

// journal is a log that tests can wait on.
type journal struct {
	mu    sync.Mutex
	text  bytes.Buffer
	lines []map[string]any
	more  chan struct{} // closed at the next line
}

func newJournal() *journal { return &journal{more: make(chan struct{})} }

func (j *journal) Write(p []byte) (int, error) {
	var line map[string]any
	if err := json.Unmarshal(p, &line); err != nil {
		return 0, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.text.Write(p)
	j.lines = append(j.lines, line)
	close(j.more)
	j.more = make(chan struct{})
	return len(p), nil
}

// find returns the lines that hold all the texts.
func (j *journal) find(texts ...string) (found []map[string]any, more <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, line := range j.lines {
		b, _ := json.Marshal(line)
		all := true
		for _, t := range texts {
			quoted, _ := json.Marshal(t)
			all = all && bytes.Contains(b, quoted[1:len(quoted)-1])
		}
		if all {
			found = append(found, line)
		}
	}
	return found, j.more
}

// wait returns the one line that holds all the texts, once it is there.
func (j *journal) wait(t *testing.T, texts ...string) map[string]any {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		found, more := j.find(texts...)
		if len(found) > 1 {
			t.Fatalf("%d lines hold %q; want one", len(found), texts)
		}
		if len(found) == 1 {
			return found[0]
		}
		select {
		case <-more:
		case <-ctx.Done():
			t.Fatalf("no line holds %q:\n%s", texts, j.String())
		}
	}
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}
