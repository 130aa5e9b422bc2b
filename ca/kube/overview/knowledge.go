package overview

import (
	"fmt"
	"slices"
	"time"

	"github.com/meshca/meshca/ca/kube/report"
)

// knowledge is what all replicas say of each workload.
type knowledge struct {
	docs    []*report.Document
	rows    map[string][]said // by name
	partial bool              // some are known and not told
}

type said struct {
	report.Row
	replica string
}

func know(docs []*report.Document) *knowledge {
	k := &knowledge{docs: docs, rows: make(map[string][]said)}
	for _, d := range docs {
		for _, r := range d.Rows {
			k.rows[r.Name] = append(k.rows[r.Name], said{r, d.Replica})
		}
		k.partial = k.partial || d.Cut > 0 || d.Untold > 0 || d.Full
	}
	return k
}

// shown reports whether a replica vouches for a name, without saying more.
func (k *knowledge) shown(name string) bool {
	return slices.ContainsFunc(k.docs, func(d *report.Document) bool { return d.Shown.Has(name) })
}

// connected reports whether a stream shows a name.
func (k *knowledge) connected(name string) bool {
	return k.shown(name) || slices.ContainsFunc(k.rows[name], func(r said) bool { return r.Connected })
}

// issued reports whether a replica vouches for a certificate of a name.
func (k *knowledge) issued(name string) bool {
	return slices.ContainsFunc(k.docs, func(d *report.Document) bool { return d.Issued.Has(name) })
}

// judge says how a pod is; listed is false if there is nothing to say of it.
func (k *knowledge) judge(p Pod, now time.Time) (w Workload, listed bool) {
	rows, shown := k.rows[p.UID], k.shown(p.UID)
	if len(rows) == 0 && shown {
		return Workload{State: Holds}, false
	}
	w = k.merge(p.UID, rows, shown)
	w.Namespace, w.Pod, w.UID, w.Node = p.Namespace, p.Name, p.UID, p.Node
	switch {
	case k.connected(p.UID):
	case now.Sub(p.Created) < young && len(w.Findings) == 0 && !slices.ContainsFunc(rows, func(r said) bool { return !r.Since.IsZero() }):
		w.State = Starting
		return w, true
	case len(rows) == 0 && k.partial:
		w.State = Unknown
		w.Findings = append(w.Findings, Finding{What: "unknown", Reason: "the CA's replicas know more workloads than they can tell of, and this may be one of them"})
		return w, true
	default:
		w.Findings = append(w.Findings, disconnected(p, rows))
	}
	w.judge(now)
	return w, true
}

// disconnected is what is wrong with a pod that no stream shows.
func disconnected(p Pod, rows []said) Finding {
	f := Finding{What: "disconnected", Reason: fmt.Sprintf("no stream to the CA shows it: is the agent on %s there?", p.Node)}
	for _, r := range rows {
		if r.Since.After(f.Since) {
			f.Since = r.Since
		}
	}
	if !p.Running {
		f.Reason = fmt.Sprintf("it does not run yet, and no stream to the CA shows it: was its volume mounted on %s?", p.Node)
	}
	return f
}

// others are workloads that are no pod with our volume: those outside Kubernetes, and
// what else there is to say something about.
func (k *knowledge) others(pods []Pod, namespace string, now time.Time) []Workload {
	expected := make(map[string]struct{}, len(pods))
	for _, p := range pods {
		expected[p.UID] = struct{}{}
	}
	var all []Workload
	for name, rows := range k.rows {
		r := rows[0]
		if _, ok := expected[name]; ok || namespace != "" && r.Namespace != namespace {
			continue
		}
		w := k.merge(name, rows, k.shown(name))
		w.Namespace, w.Pod, w.Node = r.Namespace, r.Pod, r.Node
		if r.Pod != "" {
			w.UID = name
		} else if r.Name != r.ID {
			continue // a pod that nobody knows
		}
		if len(w.Findings) == 0 && r.Pod != "" {
			continue // an agent, or a client that asks for itself
		}
		w.judge(now)
		all = append(all, w)
	}
	return all
}

// merge brings together what replicas say of one workload: the one whose stream shows
// it knows best, and whatever another has issued since makes the older wrong.
func (k *knowledge) merge(name string, rows []said, shown bool) Workload {
	w := Workload{State: Holds}
	var current *said
	issued := time.Time{}
	for i, r := range rows {
		if w.ID == "" {
			w.ID = r.ID
		}
		if r.Connected && (current == nil || r.Since.After(current.Since)) {
			current = &rows[i]
		}
		if r.Ends.After(w.Ends) {
			w.Ends, issued = r.Ends, r.Issued
		}
	}
	if current != nil {
		w.Bundle, w.Policy, w.Replica = current.Bundle, current.Policy, current.replica
	}
	for _, r := range rows {
		for _, f := range r.Findings {
			outdated := false
			switch f.What {
			case report.EndingSoon:
				outdated = r.Ends.Before(w.Ends) || k.issued(name)
			case report.Refused:
				outdated = issued.After(f.Since)
			default:
				outdated = current != nil && r.replica != current.replica || current == nil && shown
			}
			if !outdated {
				w.Findings = append(w.Findings, Finding{f.What, f.Since, describe(f)})
			}
		}
	}
	return w
}

// describe says it in words.
func describe(f report.Finding) string {
	text := map[string]string{
		report.BundleBehind: "the last bundle is not acknowledged",
		report.PolicyBehind: "the last policy is not acknowledged",
		report.Refused:      "the CA refuses it a certificate",
		report.Refusing:     "its agent refuses what the CA sends",
		report.EndingSoon:   "its certificate was not renewed when it should",
	}[f.What]
	if text == "" {
		text = f.What // of a newer CA
	}
	if f.Reason != "" {
		text += ": " + f.Reason
	}
	return text
}

// judge sets the state by the findings.
func (w *Workload) judge(now time.Time) {
	if len(w.Findings) == 0 {
		return
	}
	w.State = Attention
	for _, f := range w.Findings {
		// Who is refused and is not known to have a certificate has none.
		if f.What == report.Refused && w.Ends.Sub(now) < soon || f.What == report.EndingSoon && w.Ends.Sub(now) < soon {
			w.State = Failing
		}
	}
}
