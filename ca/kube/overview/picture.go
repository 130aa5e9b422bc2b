package overview

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/meshca/meshca/ca/kube/report"
)

// State is how a workload is.
type State string

// The states, the worst first.
const (
	Failing   State = "failing"   // it has no certificate, or is about to have none
	Attention State = "attention" // it will need attention
	Unknown   State = "unknown"   // it cannot be told
	Starting  State = "starting"  // it is too young to be told
	Holds     State = "holds"
)

var states = []State{Failing, Attention, Unknown, Starting, Holds}

const (
	// young is how old a pod may be without a stream that shows it.
	young = 30 * time.Second
	// soon is how long before the end of a certificate, or a replica's intermediate,
	// a picture says that it fails.
	soon = 5 * time.Minute
)

// Picture is the mesh as it is seen.
type Picture struct {
	At          time.Time  `json:"at"` // by the API server's clock
	TrustDomain string     `json:"trust_domain"`
	Replicas    []Replica  `json:"replicas"`
	Bundle      uint64     `json:"bundle"` // the highest sequence
	Roots       int        `json:"roots"`
	Notes       []string   `json:"notes,omitempty"` // of the upstream: to be known, and no fault
	Policy      uint64     `json:"policy"`          // the highest version; 0 if not known
	Findings    []string   `json:"findings"`
	Counts      Counts     `json:"counts"`
	Workloads   []Workload `json:"workloads"` // those that there is anything to say about
	// Unlisted are workloads that hold, each of which a replica vouches for without
	// saying more.
	Unlisted int `json:"unlisted"`
}

// Replica is one of the CA's.
type Replica struct {
	Name       string    `json:"name"`
	Reports    bool      `json:"reports"`
	Signs      bool      `json:"signs"`
	SignsUntil time.Time `json:"signs_until,omitzero"`
	Bundle     uint64    `json:"bundle,omitempty"`
	Policy     uint64    `json:"policy,omitempty"`
	Problems   []string  `json:"problems,omitempty"`
	// Upstream is who signs its intermediate; nil for the CA's own root.
	Upstream *report.Source `json:"upstream,omitempty"`
}

// Counts are of workloads.
type Counts struct {
	Workloads int           `json:"workloads"`
	Nodes     int           `json:"nodes"`
	States    map[State]int `json:"states"`
	// Ends are of all certificates that this CA's replicas have issued and remember.
	Ends []report.Bucket `json:"ends"`
}

// Workload is a pod, or whoever else has an identity.
type Workload struct {
	Namespace string    `json:"namespace,omitempty"`
	Pod       string    `json:"pod,omitempty"`
	UID       string    `json:"uid,omitempty"`
	Node      string    `json:"node,omitempty"`
	ID        string    `json:"spiffe_id,omitempty"`
	State     State     `json:"state"`
	Ends      time.Time `json:"certificate_ends,omitzero"`
	Bundle    uint64    `json:"bundle,omitempty"` // acknowledged
	Policy    uint64    `json:"policy,omitempty"` // acknowledged
	Replica   string    `json:"replica,omitempty"`
	Findings  []Finding `json:"findings,omitempty"`
}

// Finding is why a workload does not simply hold.
type Finding struct {
	What   string    `json:"what"`
	Since  time.Time `json:"since,omitzero"`
	Reason string    `json:"reason"`
}

// Name is namespace/pod, or the SPIFFE ID.
func (w Workload) Name() string {
	if w.Pod == "" {
		return w.ID
	}
	return w.Namespace + "/" + w.Pod
}

// Worst reports whether anything needs attention, and whether anything could not be told.
func (p *Picture) Worst() (finding, unknown bool) {
	return len(p.Findings) > 0 || p.Counts.States[Failing]+p.Counts.States[Attention] > 0, p.Counts.States[Unknown] > 0
}

// Merge makes the picture. Pods are those that should have an identity, of one
// namespace if that is not empty; replicas are the CA's pods.
func Merge(docs report.Documents, replicas []string, pods []Pod, namespace string, now time.Time) *Picture {
	p := &Picture{At: now, Findings: []string{}, Workloads: []Workload{}, Counts: Counts{States: make(map[State]int)}}
	p.replicas(docs, replicas, now)
	k := know(docs.Fresh)
	nodes := make(map[string]struct{})
	for _, pod := range pods {
		nodes[pod.Node] = struct{}{}
		p.add(k.judge(pod, now))
	}
	for _, w := range k.others(pods, namespace, now) {
		p.add(w, true)
	}
	p.Counts.Nodes = len(nodes)
	slices.SortFunc(p.Workloads, func(a, b Workload) int {
		return cmp.Or(cmp.Compare(slices.Index(states, a.State), slices.Index(states, b.State)), cmp.Compare(a.Name(), b.Name()))
	})
	return p
}

func (p *Picture) add(w Workload, listed bool) {
	p.Counts.Workloads++
	p.Counts.States[w.State]++
	if listed {
		p.Workloads = append(p.Workloads, w)
	} else {
		p.Unlisted++
	}
}

// replicas judges the CA itself.
func (p *Picture) replicas(docs report.Documents, pods []string, now time.Time) {
	for _, d := range docs.Fresh {
		p.TrustDomain = d.TrustDomain
		p.Policy = max(p.Policy, d.Policy.Version)
		if d.Bundle.Sequence >= p.Bundle {
			p.Bundle, p.Roots = d.Bundle.Sequence, len(d.Bundle.Roots)
		}
		p.ends(d.Ends)
	}
	for _, d := range docs.Fresh {
		r := Replica{Name: d.Replica, Reports: true, Signs: d.Signing.Ready, SignsUntil: d.Signing.Until, Bundle: d.Bundle.Sequence, Policy: d.Policy.Version, Upstream: d.Source}
		r.Problems = p.problems(d, now)
		p.Replicas = append(p.Replicas, r)
		for _, text := range r.Problems {
			p.Findings = append(p.Findings, fmt.Sprintf("CA %s: %s", d.Replica, text))
		}
	}
	for _, name := range pods {
		if slices.ContainsFunc(docs.Fresh, func(d *report.Document) bool { return d.Replica == name }) {
			continue
		}
		reason := "its pod is there, and it does not report: it starts, hangs, or cannot reach the API server"
		for _, s := range docs.Stale {
			if s.Replica == name {
				reason = "its pod is there, and " + s.Reason
			}
		}
		p.Replicas = append(p.Replicas, Replica{Name: name, Problems: []string{reason}})
		p.Findings = append(p.Findings, fmt.Sprintf("CA %s: %s", name, reason))
	}
}

// problems are what a replica says of itself.
func (p *Picture) problems(d *report.Document, now time.Time) []string {
	var all []string
	say := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	if !d.Signing.Ready {
		say("it cannot sign: %s", d.Signing.Reason)
	}
	if u := d.Upstream; u != nil && (d.Source == nil || d.Source.State == "ok") {
		say("its upstream has refused a new intermediate since %s; it signs until %s: %s", clock(u.Since), clock(d.Signing.Until), u.Reason)
	}
	if s := d.Source; s != nil {
		p.source(s, d, say)
	}
	if d.Policy.Held != "" {
		say("policies: %s", d.Policy.Held)
	}
	if d.Bundle.Sequence < p.Bundle {
		say("it hands out bundle %d, and others %d", d.Bundle.Sequence, p.Bundle)
	}
	for _, part := range d.Degraded {
		say("%s: %s", part.Part, part.Reason)
	}
	if d.Full {
		say("it knows more workloads than it can remember, and does not tell of all")
	}
	if skew := d.Written.Sub(now); skew > time.Minute || skew < -time.Minute {
		say("its clock differs from the API server's by %v", skew.Round(time.Second).Abs())
	}
	return all
}

// source is what a replica says of its upstream. Its notes are the same for all.
func (p *Picture) source(s *report.Source, d *report.Document, say func(string, ...any)) {
	if s.State != "ok" && s.Detail != "" {
		say("upstream %s is %s; it signs until %s: %s", s.Kind, s.State, clock(d.Signing.Until), s.Detail)
	}
	if s.RestartLoses && d.Signing.Ready {
		say("do not restart it: its intermediate is in memory only, and it could not have another one now")
	}
	for _, n := range s.Notes {
		if !slices.Contains(p.Notes, n) {
			p.Notes = append(p.Notes, n)
		}
	}
}

func clock(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }

func (p *Picture) ends(buckets []report.Bucket) {
	for _, b := range buckets {
		i := slices.IndexFunc(p.Counts.Ends, func(have report.Bucket) bool { return have.Minutes == b.Minutes })
		if i < 0 {
			p.Counts.Ends = append(p.Counts.Ends, b)
			continue
		}
		p.Counts.Ends[i].Count += b.Count
	}
}

// Span is a duration as people say it.
func Span(d time.Duration) string {
	d = d.Abs()
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d d", int(d.Hours()/24))
}
