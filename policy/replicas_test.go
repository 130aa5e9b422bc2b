package policy

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// history is what an API server went through: the policies and the labels of one
// workload at each of its revisions. Most revisions change neither.
type history struct {
	sets   []*Set
	labels []map[string]string
	// Positions in the order of changes; what was written twice is two of them.
	policyChange, labelChange []int
}

func (h *history) now() int { return len(h.sets) - 1 }

func randomSet(r *rand.Rand) *Set {
	var all []Policy
	for _, app := range []string{"a", "b"} {
		if r.IntN(3) > 0 {
			all = append(all, Policy{Ref: ref(app), Selector: map[string]string{"app": app}, Mode: Mode(r.IntN(4)), Ports: map[uint16]Mode{80: Mode(r.IntN(4))}})
		}
	}
	if r.IntN(2) > 0 {
		all = append(all, Policy{Ref: ref("default"), Mode: Mode(r.IntN(4))})
	}
	return New(all, "meshca-system")
}

// step makes the next revision.
func (h *history) step(r *rand.Rand) {
	set, labels, p, l := New(nil, "meshca-system"), map[string]string{"app": "a"}, 0, 0
	if n := h.now(); n >= 0 {
		set, labels, p, l = h.sets[n], h.labels[n], h.policyChange[n], h.labelChange[n]
	}
	switch r.IntN(5) {
	case 0:
		set, p = randomSet(r), p+1
	case 1:
		labels, l = map[string]string{"app": string(rune('a' + r.IntN(3)))}, l+1
	}
	h.sets, h.labels = append(h.sets, set), append(h.labels, labels)
	h.policyChange, h.labelChange = append(h.policyChange, p), append(h.labelChange, l)
}

// watched is one of a replica's two watches.
type watched struct {
	at     int // the revision that it has come to
	number int // the one that it says so of: not above at, and not before the last change
}

// advance lets a watch come further: to a revision, of which it hears by an event
// or a bookmark, or of which only the last change before it has been heard.
func (w *watched) advance(r *rand.Rand, to int, change []int) {
	w.at = to
	last := to
	for last > 0 && change[last-1] == change[to] {
		last--
	}
	w.number = max(w.number, last+r.IntN(to-last+1))
}

type replica struct {
	policies, labels watched
	// What the agent's stream was told of last: which changes, and whether it refused.
	said                  bool
	policyTold, labelTold int
	refused, taken        bool
}

// restart lists anew, from an API server that may be behind. Streams end.
func (p *replica) restart(r *rand.Rand, now int) {
	p.said, p.taken = false, false
	back := func() watched { at := now - r.IntN(min(now, 10)+1); return watched{at, at} }
	p.policies, p.labels = back(), back()
}

// says is what a replica sends. Revisions count from 1, as an API server's do.
func (p *replica) says(h *history) *Resolved {
	return &Resolved{uint64(p.policies.number + 1), uint64(p.labels.number + 1), h.sets[p.policies.at].Resolve("shop", h.labels[p.labels.at])}
}

// concerns reports whether the agent's stream has to be told: its namespace or its
// labels had a change since it was last, or it refused, for a number that may have
// risen. That the numbers have risen by themselves it is not told.
func (p *replica) concerns(h *history) bool {
	return !p.said || p.refused || p.policyTold != h.policyChange[p.policies.at] || p.labelTold != h.labelChange[p.labels.at]
}

// tell notes what the stream was told.
func (p *replica) tell(h *history, err error) {
	p.said, p.refused = true, err != nil
	p.policyTold, p.labelTold = h.policyChange[p.policies.at], h.labelChange[p.labels.at]
}

// An agent stays on a replica's stream for a while, and is told there only what
// concerns it. It does not go back behind what held where it was, not even where that
// was the same as before: a change that was taken back counts. Told only what is
// different it would.
func TestT10_F69_UntoldNumbersTakeNobodyBack(t *testing.T) {
	if n := goBack(t, func(p *replica, h *history, _ *Resolved) bool { return p.concerns(h) }); n != 0 {
		t.Errorf("%d agents went back", n)
	}
	if goBack(t, func(p *replica, h *history, held *Resolved) bool {
		return !p.said || p.refused || !held.Equal(p.says(h).Result)
	}) == 0 {
		t.Error("agents that are told only what is different never went back: nothing was tried")
	}
}

// goBack counts the agents that took an older state, with other content, than one
// that they had by then. Each must end with what holds.
func goBack(t *testing.T, concerns func(*replica, *history, *Resolved) bool) (back int) {
	t.Helper()
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 96))
		h := new(history)
		h.step(r)
		var replicas [2]replica
		var held *Resolved
		var policyOf, labelsOf, on int
		look := func() {
			p := &replicas[on]
			policies, labels := h.policyChange[p.policies.at], h.labelChange[p.labels.at]
			next := p.says(h)
			if !concerns(p, h, held) {
				// It has what holds here, if it took what it was told last.
				if p.taken {
					policyOf, labelsOf = policies, labels
				}
				return
			}
			was := held
			newer, err := next.Succeeds(held)
			p.tell(h, err)
			p.taken = newer
			if !newer {
				return
			}
			if was != nil && !was.Equal(next.Result) && (policies < policyOf || labels < labelsOf) {
				back++
			}
			held, policyOf, labelsOf = next, policies, labels
		}
		for range 80 {
			h.step(r)
			for i := range replicas {
				p := &replicas[i]
				if r.IntN(3) == 0 {
					p.policies.advance(r, p.policies.at+r.IntN(h.now()-p.policies.at+1), h.policyChange)
				}
				if r.IntN(3) == 0 {
					p.labels.advance(r, p.labels.at+r.IntN(h.now()-p.labels.at+1), h.labelChange)
				}
				if r.IntN(20) == 0 {
					p.restart(r, h.now())
				}
			}
			if r.IntN(10) == 0 { // the stream ends, and another begins
				replicas[on].said, replicas[on].taken = false, false
				on = r.IntN(2)
			}
			look()
		}
		p := &replicas[on]
		p.policies, p.labels = watched{h.now(), h.now()}, watched{h.now(), h.now()}
		look()
		if want := h.sets[h.now()].Resolve("shop", h.labels[h.now()]); !held.Equal(want) {
			t.Fatalf("seed %d: the replica has caught up, and the agent has %v, want %v", seed, describe(held.Result), describe(want))
		}
	}
	return back
}

// Two replicas lag independently behind a random history, list anew, hear of
// progress or do not; an agent goes from one to the other at random. It never takes
// what is older in policies or in labels than what it has, and when the replicas have
// caught up it has what holds.
func TestT10_F69_AgentNeverGoesBack(t *testing.T) {
	refused, taken := 0, 0
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 69))
		h := new(history)
		h.step(r)
		var replicas [2]replica
		var held *Resolved
		var policyOf, labelsOf int // what held was made from
		ask := func(p *replica) {
			next := p.says(h)
			newer, err := next.Succeeds(held)
			if err != nil {
				refused++
			}
			if !newer {
				return
			}
			taken++
			policies, labels := h.policyChange[p.policies.at], h.labelChange[p.labels.at]
			if policies < policyOf || labels < labelsOf {
				t.Fatalf("seed %d: the agent went from policies %d, labels %d back to %d, %d", seed, policyOf, labelsOf, policies, labels)
			}
			held, policyOf, labelsOf = next, policies, labels
		}
		for range 60 {
			h.step(r)
			for i := range replicas {
				p := &replicas[i]
				if r.IntN(3) == 0 {
					p.policies.advance(r, p.policies.at+r.IntN(h.now()-p.policies.at+1), h.policyChange)
				}
				if r.IntN(3) == 0 {
					p.labels.advance(r, p.labels.at+r.IntN(h.now()-p.labels.at+1), h.labelChange)
				}
				if r.IntN(20) == 0 {
					p.restart(r, h.now())
				}
			}
			if r.IntN(2) == 0 {
				ask(&replicas[r.IntN(2)])
			}
		}
		for i := range replicas {
			replicas[i] = replica{policies: watched{h.now(), h.now()}, labels: watched{h.now(), h.now()}}
		}
		ask(&replicas[r.IntN(2)])
		if want := h.sets[h.now()].Resolve("shop", h.labels[h.now()]); !held.Equal(want) {
			t.Fatalf("seed %d: the replicas have caught up, and the agent has %v, want %v", seed, describe(held.Result), describe(want))
		}
	}
	if refused == 0 || taken == 0 {
		t.Errorf("%d policies taken, %d refused: nothing was tried", taken, refused)
	}
}

func describe(r Result) string {
	return fmt.Sprintf("%v by %v, ports %s", r.Mode, r.Source, r.DescribePorts())
}
