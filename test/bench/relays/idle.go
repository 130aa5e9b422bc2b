package relays

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/meshca/meshca/test/bench/measure"
	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/bench/table"
)

// descriptors raises this process' limit of them, and so that of its children, as
// far as the kernel allows, and returns it. A relay with n connections needs 2n,
// and so do the client and the backend, which are here.
func descriptors(want uint64) (int, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("reading the limit of open files: %w", err)
	}
	if limit.Max < want {
		raised := syscall.Rlimit{Cur: want, Max: want}
		if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &raised) == nil {
			return int(want), nil
		}
	}
	// Set in any case: only then children have it as well.
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("raising the limit of open files: %w", err)
	}
	return int(min(limit.Max, want)), nil
}

// idle measures what idle connections take, of a process that has not had so many
// before: freed memory that a process has kept would hide what new connections
// need.
func idle(ctx context.Context, r *rig.Run, p *table.Part, m *mesh, kind *relay, counts []int) (err error) {
	s, err := start(ctx, r, kind, kind.file+"-idle", m.client)
	if err != nil {
		return err
	}
	var conns []net.Conn
	defer func() {
		closeAll(conns)
		err = errors.Join(err, s.backend.awaitOpen(ctx, 0), s.stop())
	}()
	before, err := s.settled(ctx, r.For(2*time.Second))
	if err != nil {
		return err
	}
	for _, n := range counts {
		more, err := s.target.open(ctx, n-len(conns))
		conns = append(conns, more...)
		if err != nil {
			return fmt.Errorf("%s, after %d connections: %w", kind.name, len(conns), err)
		}
		after, err := s.settled(ctx, r.For(2*time.Second))
		if err != nil {
			return err
		}
		p.Add(idleGroup(n), kind.name, "KiB", float64(after-before)/1024/float64(n))
	}
	// All are still there, or the figure is of fewer.
	return s.backend.awaitOpen(ctx, len(conns))
}

// settled returns the relay's anonymous memory once it has not changed by more
// than 1 % for a while, or after five times as long in any case.
func (s *running) settled(ctx context.Context, while time.Duration) (int64, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	var reference int64
	since := began
	for {
		m, err := measure.MemoryOf(s.family...)
		if err != nil {
			return 0, err
		}
		if change := m.Anonymous - reference; max(change, -change) > reference/100 {
			reference, since = m.Anonymous, time.Now()
		}
		if time.Since(since) >= while || time.Since(began) >= 5*while {
			return m.Anonymous, nil
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-tick.C:
		}
	}
}
