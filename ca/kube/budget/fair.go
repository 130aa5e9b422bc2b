package budget

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
)

// errBusy says that a node waits for more requests than may wait.
var errBusy = errors.New("too many requests are waiting for this node already")

// fair hands out a number of places. Each node has at most some of them, and nodes
// that wait take turns: one that floods holds up itself.
type fair struct {
	each, waiting int // places, and waiters, of one node at most

	mu     sync.Mutex
	free   int
	inUse  map[string]int
	queues map[string][]chan struct{}
	turns  []string // nodes with waiters, the next first
}

func newFair(places, each, waiting int) *fair {
	return &fair{each: each, waiting: waiting, free: places, inUse: make(map[string]int), queues: make(map[string][]chan struct{})}
}

// enter waits for a place. Leave must be called once.
func (f *fair) enter(ctx context.Context, node string) (leave func(), err error) {
	f.mu.Lock()
	if f.free > 0 && f.inUse[node] < f.each && len(f.queues[node]) == 0 {
		f.takeLocked(node)
		f.mu.Unlock()
		return func() { f.leave(node) }, nil
	}
	if len(f.queues[node]) >= f.waiting {
		f.mu.Unlock()
		return nil, errBusy
	}
	if len(f.queues[node]) == 0 {
		f.turns = append(f.turns, node)
	}
	turn := make(chan struct{})
	f.queues[node] = append(f.queues[node], turn)
	f.mu.Unlock()
	select {
	case <-turn:
		return func() { f.leave(node) }, nil
	case <-ctx.Done():
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.Index(f.queues[node], turn)
	if i < 0 { // it was given a place meanwhile
		return func() { f.leave(node) }, nil
	}
	f.dropLocked(node, i)
	return nil, fmt.Errorf("waiting for a turn: %w", context.Cause(ctx))
}

func (f *fair) takeLocked(node string) {
	f.free--
	f.inUse[node]++
}

func (f *fair) leave(node string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.free++
	if f.inUse[node]--; f.inUse[node] == 0 {
		delete(f.inUse, node)
	}
	for f.free > 0 {
		i := slices.IndexFunc(f.turns, func(n string) bool { return f.inUse[n] < f.each })
		if i < 0 {
			return
		}
		next := f.turns[i]
		turn := f.queues[next][0]
		f.dropLocked(next, 0)
		if len(f.queues[next]) > 0 { // behind the others
			at := slices.Index(f.turns, next)
			f.turns = append(slices.Delete(f.turns, at, at+1), next)
		}
		f.takeLocked(next)
		close(turn)
	}
}

// dropLocked takes a waiter out of its node's queue.
func (f *fair) dropLocked(node string, i int) {
	f.queues[node] = slices.Delete(f.queues[node], i, i+1)
	if len(f.queues[node]) == 0 {
		delete(f.queues, node)
		f.turns = slices.DeleteFunc(f.turns, func(n string) bool { return n == node })
	}
}
