package sds

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"
)

// socket is the listener that [Listen] returns.
type socket struct {
	path  string // as it was given
	mode  fs.FileMode
	stays bool // when it is closed
	alone bool // nobody else makes sockets in the folder

	mu     sync.Mutex
	place  place
	closed bool
}

// place is a listening socket and where it has its name.
type place struct {
	*net.UnixListener
	folder *folder
	name   string
	info   fs.FileInfo // which socket this is
}

func (s *socket) current() place {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.place
}

// Addr returns the path as it was given.
func (s *socket) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: s.path} }

// Accept waits for the next connection, to whichever socket has the name then.
func (s *socket) Accept() (net.Conn, error) {
	for {
		p := s.current()
		c, err := p.Accept()
		if err == nil || s.current().UnixListener == p.UnixListener {
			return c, err
		}
	}
}

// Close stops listening and removes the socket, unless it is to stay or another
// has taken its place. It may be called more than once.
func (s *socket) Close() error {
	s.mu.Lock()
	p, closed := s.place, s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	if s.stays {
		return errors.Join(p.Close(), p.folder.Close())
	}
	return errors.Join(p.Close(), p.remove(s.alone), p.folder.Close())
}

// remove takes the folder's lock: another agent may be about to put its own
// socket in this place, which must not be what is removed. Without the lock the
// socket stays; one that nobody answers on harms nobody.
func (p place) remove(alone bool) error {
	if !alone {
		unlock, err := p.folder.lock()
		if err != nil {
			return err
		}
		defer unlock()
	}
	info, err := p.folder.Lstat(p.name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !os.SameFile(info, p.info) {
		return nil
	}
	return p.folder.Remove(p.name)
}

// restore makes the socket again if its path is not it any more: a tidy-up of
// the folder must not leave an agent that nobody can reach. Another server's
// socket stays. Connections that are open are not touched.
func (s *socket) restore() (made bool, err error) {
	if info, err := os.Lstat(s.path); err == nil && os.SameFile(info, s.current().info) {
		return false, nil
	}
	fresh, err := s.make()
	if err != nil {
		return false, fmt.Errorf("making the agent's socket %q: %w", s.path, err)
	}
	s.mu.Lock()
	old, closed := s.place, s.closed
	if !closed {
		s.place = fresh
	}
	s.mu.Unlock()
	if closed {
		return false, errors.Join(fresh.Close(), fresh.remove(s.alone), fresh.folder.Close())
	}
	return true, errors.Join(old.Close(), old.folder.Close())
}

// keepSocket restores the socket until ctx ends.
func (s *Server) keepSocket(ctx context.Context, l *socket) {
	ticker := time.NewTicker(judgeInterval)
	defer ticker.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		made, err := l.restore()
		switch {
		case made:
			s.conf.Log.Warn("the agent's socket was gone, and has been made again", "path", l.path)
			said = ""
		case err == nil:
			said = ""
		case err.Error() != said:
			said = err.Error()
			s.conf.Log.Error("the agent's socket is gone, and cannot be made again; new clients cannot connect", "path", l.path, "reason", said)
		}
	}
}
