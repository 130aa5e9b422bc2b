package server

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"sync"
	"time"

	istio "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/identity"
)

const (
	// answerKept is for how long an answer is given again to who repeats his request.
	answerKept = 30 * time.Second
	// mostAnswers bounds their memory, of about 2 KiB each.
	mostAnswers = 4096
)

// answers has a request that comes again answered as the first time: who lost the
// answer, or did not wait for it, and asks once more is not signed for twice. The
// requests are alike when the same caller asks for the same key, in the same bytes,
// for the same time.
type answers struct {
	mu   sync.Mutex // guards all
	now  func() time.Time
	all  map[request]*answered
	done *list.List // of *answered with an answer, oldest first
}

// request is what makes two requests one: a digest of all that counts in it.
type request [sha256.Size]byte

type answered struct {
	request request
	bundle  *identity.Bundle // that was the current one
	cancel  context.CancelFunc
	wanted  int           // who wait for it; guarded by mu
	over    chan struct{} // closed when what follows is there
	resp    *istio.IstioCertificateResponse
	err     error
	at      time.Time // when it was over
}

func newAnswers() *answers {
	return &answers{now: time.Now, all: make(map[request]*answered), done: list.New()}
}

// requestOf digests a request. The caller's pod is in it, and not only the identity:
// each pod of a ServiceAccount has a certificate of its own.
func requestOf(who *caller.Caller, csr string, lifetime time.Duration) request {
	h := sha256.New()
	for _, s := range []string{who.Resource(), who.ID().String(), csr} {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(lifetime))
	h.Write(n[:])
	return request(h.Sum(nil))
}

// create makes an answer. Its context ends when nobody waits for that any more, and
// after the time that a call may take.
type create func(context.Context) (*istio.IstioCertificateResponse, error)

// get answers a request: by create, or as it was answered before, while bundle is
// still the one that is told.
func (a *answers) get(ctx context.Context, r request, bundle *identity.Bundle, timeout time.Duration, create create) (resp *istio.IstioCertificateResponse, again bool, err error) {
	a.mu.Lock()
	a.forgetLocked()
	e := a.all[r]
	if again = e != nil && e.bundle == bundle; !again {
		e = &answered{request: r, bundle: bundle, over: make(chan struct{})}
		a.all[r] = e
	}
	e.wanted++
	a.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { a.leave(e) })
	defer func() {
		if stop() {
			a.leave(e)
		}
	}()
	if again {
		select {
		case <-e.over:
			return e.resp, true, e.err
		case <-ctx.Done():
			return nil, true, ctx.Err()
		}
	}
	a.make(ctx, e, timeout, create)
	if e.err != nil && ctx.Err() != nil {
		return nil, false, ctx.Err() // it says whether time ran out, or the caller went
	}
	return e.resp, false, e.err
}

// make makes the answer. A panic leaves an error for the others who wait.
func (a *answers) make(ctx context.Context, e *answered, timeout time.Duration, create create) {
	detached, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	a.mu.Lock()
	if e.cancel = cancel; e.wanted == 0 {
		cancel()
	}
	a.mu.Unlock()
	e.err = guard(func() (err error) {
		e.resp, err = create(detached)
		return err
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	e.at, e.cancel = a.now(), nil // cancel leads to all that the call holds
	close(e.over)
	if e.err == nil && a.all[e.request] == e {
		a.done.PushBack(e)
		return
	}
	if a.all[e.request] == e {
		delete(a.all, e.request)
	}
}

// leave ends the making of an answer that nobody waits for.
func (a *answers) leave(e *answered) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if e.wanted--; e.wanted == 0 && e.cancel != nil {
		e.cancel()
	}
}

// forgetLocked drops the oldest answers: those that are too old, or too many.
func (a *answers) forgetLocked() {
	now := a.now()
	for front := a.done.Front(); front != nil; front = a.done.Front() {
		e := front.Value.(*answered)
		if a.done.Len() < mostAnswers && now.Sub(e.at) < answerKept {
			return
		}
		a.done.Remove(front)
		if a.all[e.request] == e {
			delete(a.all, e.request)
		}
	}
}
