package sds

import "sync"

// What each server of a [Budget] gets whatever the others hold: enough for an
// Envoy and some programs.
const (
	ownConnections = 4
	ownCalls       = 16
)

// Budget bounds what all servers of a process hold at once, so that the workloads
// of one node cannot together take the memory of the agent that serves all of
// them. Each server has a few places for itself; what it uses beyond comes out of
// what all share, and the limits of its own socket bound its part of that.
type Budget struct {
	mu                 sync.Mutex
	connections, calls int // left to share
}

// NewBudget makes a budget with so many connections and calls to share.
func NewBudget(connections, calls int) *Budget {
	return &Budget{connections: connections, calls: calls}
}

// places counts what one server holds of one thing. The nil *Budget shares
// without end.
type places struct {
	budget   *Budget
	left     func(*Budget) *int
	own, max int

	mu   sync.Mutex
	held int
}

func (b *Budget) forConnections(max int) *places {
	return &places{budget: b, left: func(b *Budget) *int { return &b.connections }, own: ownConnections, max: max}
}

func (b *Budget) forCalls(max int) *places {
	return &places{budget: b, left: func(b *Budget) *int { return &b.calls }, own: ownCalls, max: max}
}

// take takes a place if there is one.
func (p *places) take() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held >= p.max || p.held >= p.own && !p.share(-1) {
		return false
	}
	p.held++
	return true
}

// leave gives one back; the shared ones first.
func (p *places) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held--; p.held >= p.own {
		p.share(+1)
	}
}

// share changes what is left for all, unless nothing is.
func (p *places) share(n int) bool {
	if p.budget == nil {
		return true
	}
	p.budget.mu.Lock()
	defer p.budget.mu.Unlock()
	left := p.left(p.budget)
	if *left+n < 0 {
		return false
	}
	*left += n
	return true
}
