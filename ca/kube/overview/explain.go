package overview

import (
	"fmt"
	"slices"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"

	"github.com/meshca/meshca/policy"
)

// The steps of an explanation.
const (
	stepPod    = "pod"
	stepVolume = "volume"
	stepNode   = "node"
	stepEvents = "events"
	stepCA     = "CA"
	stepPolicy = "policy"
)

// Step is one thing that was looked at.
type Step struct {
	Name  string   `json:"name"`
	State State    `json:"state"`
	Text  string   `json:"text"`
	More  []string `json:"more,omitempty"`
	Do    string   `json:"do,omitempty"` // where it does not hold
}

// Explanation is everything about one pod.
type Explanation struct {
	Namespace string    `json:"namespace"`
	Pod       string    `json:"pod"`
	At        time.Time `json:"at"`
	Steps     []Step    `json:"steps"`
	Ports     []Port    `json:"ports,omitempty"`
	Workload  *Workload `json:"workload,omitempty"` // as the CA knows it
	Verdict   string    `json:"verdict"`
	Do        string    `json:"do,omitempty"`
}

// Port is what holds for a port that a container declares, and for all others (0).
type Port struct {
	Number uint16        `json:"port,omitempty"`
	Name   string        `json:"name,omitempty"`
	Mode   policy.Mode   `json:"mode"`
	Source policy.Source `json:"-"`
	By     string        `json:"by"`
}

// Worst reports whether anything needs attention, and whether anything could not be told.
func (e *Explanation) Worst() (finding, unknown bool) {
	for _, s := range e.Steps {
		finding = finding || s.State == Failing || s.State == Attention
		unknown = unknown || s.State == Unknown
	}
	return finding, unknown
}

// Explain judges the facts, in the order in which one depends on the other.
func Explain(f *Facts) *Explanation {
	e := &Explanation{Namespace: f.Namespace, Pod: f.Name, At: f.At}
	e.pod(f)
	if f.Pod != nil {
		if e.volume(f) {
			e.told(f, stepNode, e.node)
			e.told(f, stepEvents, e.events)
			e.told(f, stepCA, e.ca)
		}
		e.told(f, stepPolicy, e.policy)
	}
	e.conclude()
	return e
}

// told runs a step if what it needs could be read.
func (e *Explanation) told(f *Facts, step string, judge func(*Facts)) {
	if err := f.Untold[step]; err != nil {
		e.say(Step{Name: step, State: Unknown, Text: err.Error()})
		return
	}
	judge(f)
}

func (e *Explanation) say(s Step) { e.Steps = append(e.Steps, s) }

func (e *Explanation) pod(f *Facts) {
	p := f.Pod
	if p == nil {
		e.say(Step{stepPod, Failing, "there is no such pod", nil, fmt.Sprintf("kubectl -n %s get pods", f.Namespace)})
		return
	}
	text := fmt.Sprintf("%s on %s, ServiceAccount %s", strings.ToLower(string(p.Status.Phase)), orNone(p.Spec.NodeName, "no node yet"), p.Spec.ServiceAccountName)
	switch {
	case p.Status.Phase == core.PodSucceeded || p.Status.Phase == core.PodFailed:
		e.say(Step{stepPod, Failing, text + ": it has finished, and has no identity any more", nil, "start another one"})
	case p.DeletionTimestamp != nil:
		e.say(Step{Name: stepPod, State: Holds, Text: text + "; it is being deleted, and renews until it is gone"})
	case p.Spec.NodeName == "":
		e.say(Step{stepPod, Attention, text, nil, fmt.Sprintf("kubectl -n %s describe pod %s says what the scheduler waits for", f.Namespace, f.Name)})
	default:
		e.say(Step{Name: stepPod, State: Holds, Text: text})
	}
}

func orNone(s, none string) string {
	if s == "" {
		return none
	}
	return s
}

// volume reports whether the pod has ours, however wrong.
func (e *Explanation) volume(f *Facts) bool {
	v, ok := volume(f.Pod)
	if !ok && know(f.Docs.Fresh).connected(string(f.Pod.UID)) {
		e.say(Step{Name: stepVolume, State: Holds, Text: "it has no volume of driver " + Driver + ", and a stream to the CA of its own"})
		return true
	}
	if !ok {
		e.say(Step{stepVolume, Failing, "it has no volume of driver " + Driver + ", so it has no identity from an agent", nil,
			"add to the pod, or what makes it:\nspec:\n  volumes:\n  - name: meshca\n    csi: {driver: " + Driver + ", readOnly: true}\n  containers:\n  - volumeMounts:\n    - {name: meshca, mountPath: /run/meshca, readOnly: true}"})
		return false
	}
	if v.CSI.ReadOnly == nil || !*v.CSI.ReadOnly {
		e.say(Step{stepVolume, Failing, fmt.Sprintf("its volume %q is not read-only, and the agent mounts no other: who can write into it could put another socket there", v.Name), nil,
			fmt.Sprintf("write readOnly: true beside driver: %s in volume %q", Driver, v.Name)})
		return true
	}
	var mounts []string
	for _, c := range slices.Concat(f.Pod.Spec.InitContainers, f.Pod.Spec.Containers) {
		for _, m := range c.VolumeMounts {
			if m.Name == v.Name {
				mounts = append(mounts, fmt.Sprintf("container %s has the socket at %s/agent.sock", c.Name, strings.TrimSuffix(m.MountPath, "/")))
			}
		}
	}
	if mounts == nil {
		e.say(Step{stepVolume, Attention, fmt.Sprintf("no container mounts its volume %q", v.Name), nil,
			fmt.Sprintf("add to the container:\nvolumeMounts:\n- {name: %s, mountPath: /run/meshca, readOnly: true}", v.Name)})
		return true
	}
	e.say(Step{Name: stepVolume, State: Holds, Text: fmt.Sprintf("volume %q, read-only", v.Name), More: mounts})
	return true
}

func (e *Explanation) node(f *Facts) {
	if f.Driver == nil {
		e.say(Step{stepNode, Failing, "CSIDriver " + Driver + " is not installed, so no kubelet mounts the volume", nil, "install meshca (deploy/README.md)"})
		return
	}
	if wrong := driverFaults(f.Driver); wrong != nil {
		e.say(Step{stepNode, Failing, "CSIDriver " + Driver + " does not say " + strings.Join(wrong, ", "), nil, "install it as meshca's manifests have it; some of it can only be set when it is created"})
		return
	}
	if f.Pod.Spec.NodeName == "" {
		e.say(Step{Name: stepNode, State: Starting, Text: "the pod has no node yet"})
		return
	}
	if _, ok := volume(f.Pod); !ok {
		return // its node's agent has no part in it
	}
	for _, a := range f.Agents {
		for _, c := range a.Status.Conditions {
			if c.Type == core.PodReady && c.Status == core.ConditionTrue {
				e.say(Step{Name: stepNode, State: Holds, Text: fmt.Sprintf("agent %s/%s on %s is ready", a.Namespace, a.Name, f.Pod.Spec.NodeName)})
				return
			}
		}
	}
	if len(f.Agents) == 0 {
		e.say(Step{stepNode, Failing, "no agent runs on " + f.Pod.Spec.NodeName, nil, "look at the DaemonSet meshca-agent: does a taint, a node selector or a quota keep it away?"})
		return
	}
	a := f.Agents[0]
	e.say(Step{stepNode, Failing, fmt.Sprintf("agent %s/%s on %s is not ready (%s)", a.Namespace, a.Name, f.Pod.Spec.NodeName, strings.ToLower(string(a.Status.Phase))), nil,
		fmt.Sprintf("kubectl -n %s logs %s", a.Namespace, a.Name)})
}

// driverFaults is what the CSIDriver object lacks of docs/design.md.
func driverFaults(d *storage.CSIDriver) (faults []string) {
	is := func(b *bool) bool { return b != nil && *b }
	meshcaToken := slices.ContainsFunc(d.Spec.TokenRequests, func(t storage.TokenRequest) bool { return t.Audience == "meshca" })
	for _, c := range []struct {
		holds bool
		says  string
	}{
		{d.Spec.AttachRequired != nil && !*d.Spec.AttachRequired, "attachRequired: false"},
		{is(d.Spec.PodInfoOnMount), "podInfoOnMount: true"},
		{slices.Contains(d.Spec.VolumeLifecycleModes, storage.VolumeLifecycleEphemeral), "volumeLifecycleModes: [Ephemeral]"},
		{is(d.Spec.RequiresRepublish), "requiresRepublish: true"},
		{meshcaToken, "tokenRequests: [{audience: meshca}]"},
		{is(d.Spec.ServiceAccountTokenInSecrets), "serviceAccountTokenInSecrets: true"},
	} {
		if !c.holds {
			faults = append(faults, c.says)
		}
	}
	return faults
}

// maxEvents are shown; recent is how old one may be to count.
const (
	maxEvents = 3
	recent    = 10 * time.Minute
)

// events tells of those that are about the volume or a certificate.
func (e *Explanation) events(f *Facts) {
	var more []string
	state := Holds
	for _, ev := range f.Events {
		if ev.Reason != "FailedMount" && ev.Reason != "CertificateRefused" || len(more) == maxEvents {
			continue
		}
		age := f.At.Sub(ev.At)
		// A pod that runs was mounted after all.
		if age < recent && (ev.Reason != "FailedMount" || f.Pod.Status.Phase == core.PodPending) {
			state = Attention
		}
		more = append(more, fmt.Sprintf("%s, %d times, last %s ago: %s", ev.Reason, ev.Count, Span(age), ev.Message))
	}
	switch {
	case more == nil:
		e.say(Step{Name: stepEvents, State: Holds, Text: "none about a volume or a certificate"})
	case state == Holds:
		e.say(Step{Name: stepEvents, State: Holds, Text: "none that still counts", More: more})
	default:
		e.say(Step{Name: stepEvents, State: state, Text: "the volume could not be mounted, or a certificate was refused", More: more, Do: "do what the last event says"})
	}
}

// ca is what the replicas know.
func (e *Explanation) ca(f *Facts) {
	if len(f.Docs.Fresh) == 0 {
		e.say(Step{stepCA, Unknown, "no replica of the CA reports", nil, "meshca status"})
		return
	}
	p := f.Pod
	k := know(f.Docs.Fresh)
	w, listed := k.judge(Pod{
		UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.Spec.ServiceAccountName, Node: p.Spec.NodeName,
		Running: p.Status.Phase == core.PodRunning, Created: p.CreationTimestamp.Time,
	}, f.At)
	if !listed {
		e.say(Step{Name: stepCA, State: Holds, Text: "a stream shows it, it has acknowledged bundle and policy, and its certificate is in order; the CA lists no details of it"})
		return
	}
	e.Workload = &w
	s := Step{Name: stepCA, State: w.State, Text: orNone(w.ID, "it is not known")}
	switch {
	case w.Ends.IsZero():
		s.More = append(s.More, "when its certificate ends is not known to the replicas that run")
	case w.Ends.Before(f.At):
		s.More = append(s.More, "its certificate ended at "+clock(w.Ends))
	default:
		s.More = append(s.More, fmt.Sprintf("its certificate is good for %s, until %s", Span(w.Ends.Sub(f.At)), clock(w.Ends)))
	}
	if w.Bundle != 0 {
		s.More = append(s.More, fmt.Sprintf("acknowledged: bundle %d, policy version %d", w.Bundle, w.Policy))
	}
	for i, finding := range w.Findings {
		if i > 0 {
			s.More = append(s.More, finding.Reason)
			continue
		}
		s.Text = finding.Reason
		if w.ID != "" {
			s.More = append([]string{w.ID}, s.More...)
		}
	}
	if w.State == Failing || w.State == Attention {
		s.Do = fmt.Sprintf("look at the agent on %s, and at the CA's log", orNone(p.Spec.NodeName, "its node"))
		if len(w.Findings) > 0 {
			s.Do = advice(w.Findings[0].What, s.Do)
		}
	}
	e.say(s)
}

// advice is what to do about a finding.
func advice(what, otherwise string) string {
	switch what {
	case "refused":
		return "mend what the CA's reason names; the agent tries again by itself"
	case "ending_soon":
		return "look why the agent does not renew: its log, and whether it reaches the CA on port 15012"
	}
	return otherwise
}

// policy is what holds for its ports.
func (e *Explanation) policy(f *Facts) {
	x := policy.New(f.Policies, f.Root).Explain(f.Namespace, f.Pod.Labels)
	port := func(number uint16, name string) {
		p := Port{Number: number, Name: name, Mode: x.Mode, Source: x.Source}
		if number != 0 {
			p.Mode, p.Source = x.ForPort(number), x.SourceForPort(number)
		}
		p.By = p.Source.String()
		e.Ports = append(e.Ports, p)
	}
	for _, c := range f.Pod.Spec.Containers {
		for _, p := range c.Ports {
			if p.Protocol == core.ProtocolUDP || p.Protocol == core.ProtocolSCTP {
				continue
			}
			port(uint16(p.ContainerPort), p.Name)
		}
	}
	port(0, "")
	s := Step{Name: stepPolicy, State: Holds, Text: fmt.Sprintf("%s, by %s", x.Mode, x.Source), More: x.Warnings}
	for _, l := range x.Lost {
		s.More = append(s.More, fmt.Sprintf("%s (%s) has no effect here: %s", l.Policy, l.Mode, l.Reason))
	}
	e.say(s)
}

// conclude is the verdict: the first step that does not hold is what to mend.
func (e *Explanation) conclude() {
	for _, states := range [][]State{{Failing}, {Attention}, {Unknown}} {
		for _, s := range e.Steps {
			if slices.Contains(states, s.State) {
				e.Verdict, e.Do = s.Name+": "+s.Text, s.Do
				if s.State == Unknown {
					e.Verdict = "not all of it could be told: " + e.Verdict
				}
				return
			}
		}
	}
	e.Verdict = "all holds"
}
