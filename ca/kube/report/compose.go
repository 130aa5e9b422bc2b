package report

import (
	"cmp"
	"encoding/hex"
	"slices"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/census"
	"github.com/meshca/meshca/identity"
)

const (
	// patience is how long an answer to a resource may take. Agents answer at once;
	// what is shorter would list whole meshes at each change.
	patience = 10 * time.Second

	// linger is how long a workload counts as shown after its stream has ended. Streams
	// end all the time and come back at once, if to another replica, which may have
	// reported a moment before it knew.
	linger = 20 * time.Second

	// remembered is how long a workload that no stream shows, whose pod is not known
	// to live, is kept for its refusal's or its certificate's sake.
	remembered = time.Hour

	// refusalHolds is how long a refusal counts that was not repeated. Agents try again
	// within minutes, if at another replica.
	refusalHolds = 10 * time.Minute
)

// Pod is what the cluster says of a pod.
type Pod struct {
	Namespace, Name string
	Alive           bool
}

// Sources are what a document is composed from. All are required.
type Sources struct {
	Authority *ca.Authority
	// Ready says whether a certificate could be issued to a caller.
	Ready  func() error
	Census *census.Census
	// Pod returns what is known of the pod with a UID; it asks nobody.
	Pod    func(uid string) (Pod, bool)
	Policy func() (version uint64, held string)
	// Problems returns the parts that do not work.
	Problems func() []Problem
}

// compose is the document of now.
func (s Sources) compose(d Document, now time.Time) *Document {
	d.Written = now
	s.authority(&d)
	d.Policy.Version, d.Policy.Held = s.Policy()
	d.Policy.Held = cut(d.Policy.Held)
	d.Degraded = s.Problems()
	for i := range d.Degraded {
		d.Degraded[i].Reason = cut(d.Degraded[i].Reason)
	}
	ends := newEnds()
	var need, calm []Row
	s.Census.Each(func(w census.Workload) bool {
		row, keep := s.row(w, now)
		if !keep {
			return false
		}
		d.Counts.add(row)
		ends.add(row, now)
		if len(row.Findings) > 0 {
			need = append(need, row)
		} else {
			calm = append(calm, row)
		}
		return true
	})
	d.Ends = ends.buckets
	d.Full = s.Census.Left() > 0
	d.list(need, calm)
	return &d
}

func (s Sources) authority(d *Document) {
	status := s.Authority.Status()
	d.Signing = Signing{Ready: true, Authority: status.Authority, Until: status.SignsUntil, RenewAt: status.RenewAt}
	if err := s.Ready(); err != nil {
		d.Signing.Ready, d.Signing.Reason = false, cut(err.Error())
	}
	if status.UpstreamErr != nil {
		d.Upstream = &Trouble{status.UpstreamSince, cut(status.UpstreamErr.Error())}
	}
	if u := status.Upstream; u.Kind != "" {
		d.Source = &Source{
			Kind: u.Kind, State: u.State, Detail: cutAt(u.Detail, maxDetail), RestartLoses: status.RestartLoses(),
			Next: u.Next, NextAt: u.NextAt,
		}
		for _, n := range u.Notes[:min(len(u.Notes), maxNotes)] {
			d.Source.Notes = append(d.Source.Notes, cutAt(n, maxDetail))
		}
	}
	d.Bundle.Roots = []Root{}
	bundle, _ := s.Authority.Bundle()
	if bundle == nil {
		return
	}
	d.Bundle.Sequence = bundle.Sequence()
	for _, a := range bundle.Authorities() {
		d.Bundle.Roots = append(d.Bundle.Roots, Root{hex.EncodeToString(a.SubjectKeyId), a.NotAfter})
	}
}

// row says what there is to say of a workload; keep is false if it is gone.
func (s Sources) row(w census.Workload, now time.Time) (r Row, keep bool) {
	pod, known := s.Pod(w.Name)
	if w.Streams == 0 {
		last := latest(w.Since, w.Issued, w.Refused.At)
		// A pod that has not been heard of may be newer than what is known.
		if known && !pod.Alive || !known && now.Sub(last) > patience && !isID(w.Name) || now.Sub(last) > remembered && !now.Before(w.Ends) {
			return Row{}, false
		}
	}
	r = Row{
		Name: w.Name, Namespace: pod.Namespace, Pod: pod.Name, Node: w.Node, Connected: w.Streams > 0 || !w.Since.IsZero() && now.Sub(w.Since) < linger, Since: w.Since,
		Issued: w.Issued, Ends: w.Ends, Bundle: w.Acked.Bundle, Policy: w.Acked.Policy,
	}
	if !w.ID.IsZero() {
		r.ID = w.ID.String()
	}
	find := func(what string, since time.Time, reason string) {
		r.Findings = append(r.Findings, Finding{what, since, cut(reason)})
	}
	if w.Refused.Reason != "" && now.Sub(w.Refused.At) < refusalHolds {
		find(Refused, w.Refused.At, w.Refused.Reason)
	}
	if w.Streams == 0 {
		return r, true // what becomes of it is for another replica to know
	}
	if lifetime := w.Ends.Sub(w.Issued); !w.Ends.IsZero() && w.Ends.Sub(now) < lifetime/4 {
		find(EndingSoon, w.Issued, "")
	}
	if w.Nacked.Reason != "" {
		find(Refusing, w.Nacked.At, w.Nacked.Reason)
	}
	if !w.SentAt.IsZero() && now.Sub(w.SentAt) > patience {
		if w.Sent.Bundle != w.Acked.Bundle {
			find(BundleBehind, w.SentAt, "")
		}
		if w.Sent.Policy != w.Acked.Policy {
			find(PolicyBehind, w.SentAt, "")
		}
	}
	return r, true
}

func isID(name string) bool {
	_, err := identity.ParseID(name)
	return err == nil
}

func latest(times ...time.Time) time.Time { return slices.MaxFunc(times, time.Time.Compare) }

func (c *Counts) add(r Row) {
	c.Workloads++
	if r.Connected {
		c.Connected++
	}
	for _, f := range r.Findings {
		switch f.What {
		case BundleBehind:
			c.BundleBehind++
		case PolicyBehind:
			c.PolicyBehind++
		case Refused:
			c.Refused++
		case Refusing:
			c.Refusing++
		case EndingSoon:
			c.EndingSoon++
		}
	}
}

// list puts rows into the document, those that need attention first, and those among
// them first that no renewal will mend.
func (d *Document) list(need, calm []Row) {
	byName := func(a, b Row) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.Name, b.Name))
	}
	slices.SortFunc(need, func(a, b Row) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), byName(a, b))
	})
	slices.SortFunc(calm, byName)
	if n := len(need) - MaxRows; n > 0 {
		d.Cut, need = n, need[:MaxRows]
	}
	listed := min(len(calm), maxCalm)
	d.Rows = append(append(make([]Row, 0, len(need)+listed), need...), calm[:listed]...)
	for _, r := range calm[listed:] {
		d.count(r)
	}
	slices.Sort(d.Shown)
	slices.Sort(d.Issued)
}

// ranks are the kinds of findings, the most urgent first.
var ranks = []string{Refused, EndingSoon, Refusing, BundleBehind, PolicyBehind}

func rank(r Row) int {
	best := len(ranks)
	for _, f := range r.Findings {
		best = min(best, slices.Index(ranks, f.What))
	}
	return best
}

// ends counts certificates by how long they are still good.
type ends struct{ buckets []Bucket }

func newEnds() *ends {
	e := &ends{}
	for _, minutes := range []int{0, 5, 15, 30, 60, 4 * 60, 24 * 60} {
		e.buckets = append(e.buckets, Bucket{Minutes: minutes})
	}
	return e
}

func (e *ends) add(r Row, now time.Time) {
	if r.Ends.IsZero() {
		return
	}
	left := r.Ends.Sub(now)
	for i := range e.buckets {
		if left <= time.Duration(e.buckets[i].Minutes)*time.Minute || i == len(e.buckets)-1 {
			e.buckets[i].Count++
			return
		}
	}
}
