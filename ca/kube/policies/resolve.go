package policies

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
)

// Policy returns what holds for a workload, and a channel that is closed when that
// may have become another. podUID is empty where its token named no pod. The policy
// is nil before the API server has been asked; if it could not say, it is
// [policy.Unresolved].
func (s *Source) Policy(id identity.ID, podUID string) (*policy.Resolved, <-chan struct{}) {
	namespace, _, ok := id.Workload()
	s.mu.Lock()
	now, changed := s.now, s.awaitLocked(namespace, podUID)
	s.mu.Unlock()
	// The labels are read after the channel was made, so that no change of theirs
	// falls between the two.
	switch {
	case !now.tried || !ok:
		return nil, changed
	case now.version == 0:
		unresolved := policy.Unresolved()
		return &unresolved, changed
	}
	var in string
	var labels map[string]string
	var version uint64
	known := false
	if podUID != "" {
		in, labels, version, known = s.conf.Pods.Labels(podUID)
	}
	if !known || in != namespace {
		return &policy.Resolved{Version: now.version, Result: now.set.ResolveUnlabelled(namespace)}, changed
	}
	return &policy.Resolved{Version: now.version, WorkloadVersion: version, Result: now.set.Resolve(namespace, labels)}, changed
}

// waiter is a pod; or all of a namespace whose tokens name none.
type waiter struct{ namespace, pod string } // one of the two

type waited struct {
	changed   chan struct{} // closed when the policy may be another
	namespace string
	more      bool // somebody asked for the pod under another namespace, too
}

// awaitLocked returns the channel of a pod. All who wait for one pod share it, so
// that streams that end leave nothing behind but that.
func (s *Source) awaitLocked(namespace, podUID string) <-chan struct{} {
	who := waiter{pod: podUID}
	if podUID == "" {
		who.namespace = namespace
	}
	w, ok := s.waiting[who]
	if ok && (w.namespace == namespace || w.more) {
		return w.changed
	}
	if !ok {
		if len(s.waiting) >= maxWaiting {
			s.wakeAllLocked()
		}
		w = waited{changed: make(chan struct{}), namespace: namespace}
	} else {
		w.more = true
	}
	s.waiting[who] = w
	return w.changed
}

// podChanged wakes whoever waits for a pod.
func (s *Source) podChanged(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w, ok := s.waiting[waiter{pod: uid}]; ok {
		close(w.changed)
		delete(s.waiting, waiter{pod: uid})
	}
}

// Objects returns all policies as the API server says, in the order of
// [policy.Compare], and a channel that is closed when their specs may be others: who
// wants to see every change of a status looks again. There are none before there was a
// list.
func (s *Source) Objects() ([]Object, <-chan struct{}) {
	s.mu.Lock()
	told := s.told
	s.mu.Unlock()
	return s.all.objects(), told
}

func (s *Source) tellObjects() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.told)
	s.told = make(chan struct{})
}

// longestSilence is how long nothing may be heard of policies before somebody should
// look: a few watches and their bookmarks.
const longestSilence = 5 * time.Minute

// Degraded says that what is in force may be old, as the API server has been silent for
// 5 min; nil if it has not. What is in force stays, so it is no reason to send nobody.
func (s *Source) Degraded() error {
	if age := s.all.age(); age > longestSilence {
		return fmt.Errorf("the API server has told nothing of PeerAuthentications for %v; what was in force then still is", age.Round(time.Second))
	}
	return nil
}

type metrics struct {
	policies, held prometheus.Gauge
}

func (m *metrics) register(s *Source, r prometheus.Registerer) error {
	m.policies = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "meshca_policy_policies", Help: "PeerAuthentications in force.",
	})
	m.held = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "meshca_policy_held", Help: "1 while what the API server says of policies is not taken over, and while none are known: running proxies keep what they have. The log says why.",
	})
	m.held.Set(1)
	version := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "meshca_policy_version", Help: "Version of the policies that agents are sent; 0 while they are not known.",
	}, func() float64 { return float64(s.version()) })
	age := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "meshca_policy_watch_age_seconds", Help: "How long ago the API server told anything of policies. It does at least each minute, even if nothing changes; 0 before it ever did.",
	}, func() float64 { return s.all.age().Seconds() })
	for _, c := range []prometheus.Collector{m.policies, m.held, version, age} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
