package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/overview"
	"github.com/meshca/meshca/policy"
)

// good are the facts of a pod of which all holds.
func good() *overview.Facts {
	yes, no := true, false
	docs, _ := shopMesh()
	const name = "cart-7d9f-x2x8l"
	return &overview.Facts{
		Namespace: "shop", Name: name, At: statusNow, Root: "meshca-system", Docs: docs, Untold: map[string]error{},
		Pod: &core.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: name, Labels: map[string]string{"app": "cart"}, CreationTimestamp: metav1.NewTime(statusNow.Add(-time.Hour))},
			Spec: core.PodSpec{
				NodeName: "node-1", ServiceAccountName: "cart",
				Volumes: []core.Volume{{Name: "identity", VolumeSource: core.VolumeSource{CSI: &core.CSIVolumeSource{Driver: overview.Driver, ReadOnly: &yes}}}},
				Containers: []core.Container{{
					Name: "app", VolumeMounts: []core.VolumeMount{{Name: "identity", MountPath: "/run/meshca"}},
					Ports: []core.ContainerPort{{ContainerPort: 8080, Name: "http"}, {ContainerPort: 9090}, {ContainerPort: 53, Protocol: core.ProtocolUDP}},
				}},
			},
			Status: core.PodStatus{Phase: core.PodRunning},
		},
		Driver: &storage.CSIDriver{Spec: storage.CSIDriverSpec{
			AttachRequired: &no, PodInfoOnMount: &yes, VolumeLifecycleModes: []storage.VolumeLifecycleMode{storage.VolumeLifecycleEphemeral},
			RequiresRepublish: &yes, TokenRequests: []storage.TokenRequest{{Audience: "meshca"}}, ServiceAccountTokenInSecrets: &yes,
		}},
		Agents: []core.Pod{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "meshca-agents", Name: "meshca-agent-4kx2p"},
			Status:     core.PodStatus{Phase: core.PodRunning, Conditions: []core.PodCondition{{Type: core.PodReady, Status: core.ConditionTrue}}},
		}},
		Policies: []policy.Policy{
			{Ref: policy.Ref{Namespace: "shop", Name: "default"}, Mode: policy.Strict, Created: statusNow.Add(-time.Hour)},
			{Ref: policy.Ref{Namespace: "shop", Name: "scrape"}, Mode: policy.Unset, Selector: map[string]string{"app": "cart"}, Ports: map[uint16]policy.Mode{9090: policy.Permissive}, Created: statusNow.Add(-time.Hour)},
			{Ref: policy.Ref{Namespace: "shop", Name: "younger"}, Mode: policy.Disable, Created: statusNow},
		},
	}
}

func TestExplainAsPeopleSeeIt(t *testing.T) {
	for name, tt := range map[string]struct {
		change           func(*overview.Facts)
		finding, unknown bool
		says             []string
	}{
		"good": {change: func(*overview.Facts) {}, says: []string{"all holds", "port 9090: PERMISSIVE, shop/scrape", "port 8080 (http): STRICT, shop/default", "shop/younger (DISABLE) has no effect"}},
		"none": {change: func(f *overview.Facts) { f.Pod = nil }, finding: true, says: []string{"there is no such pod"}},
		"no-volume": {change: func(f *overview.Facts) { f.Pod.Spec.Volumes, f.Pod.UID = nil, "other" }, finding: true,
			says: []string{"no volume of driver csi.meshca.dev", "\n    - name: meshca\n      csi: {driver: csi.meshca.dev, readOnly: true}\n"}},
		"by-itself":      {change: func(f *overview.Facts) { f.Pod.Spec.Volumes = nil; f.Agents = nil; f.Pod.UID = "calm-2" }, finding: false, says: []string{"a stream to the CA of its own", "all holds"}},
		"writable":       {change: func(f *overview.Facts) { f.Pod.Spec.Volumes[0].CSI.ReadOnly = nil }, finding: true, says: []string{"not read-only", "write readOnly: true"}},
		"not-mounted":    {change: func(f *overview.Facts) { f.Pod.Spec.Containers[0].VolumeMounts = nil }, finding: true, says: []string{"no container mounts", "mountPath: /run/meshca"}},
		"unscheduled":    {change: func(f *overview.Facts) { f.Pod.Spec.NodeName = "" }, finding: true, says: []string{"no node yet", "describe pod"}},
		"finished":       {change: func(f *overview.Facts) { f.Pod.Status.Phase = core.PodFailed }, finding: true, says: []string{"it has finished"}},
		"no-driver":      {change: func(f *overview.Facts) { f.Driver = nil }, finding: true, says: []string{"is not installed"}},
		"another-driver": {change: func(f *overview.Facts) { f.Driver.Spec.RequiresRepublish = nil; f.Driver.Spec.TokenRequests = nil }, finding: true, says: []string{"does not say requiresRepublish: true, tokenRequests"}},
		"no-agent":       {change: func(f *overview.Facts) { f.Agents = nil }, finding: true, says: []string{"no agent runs on node-1", "DaemonSet"}},
		"agent-not-ready": {change: func(f *overview.Facts) { f.Agents[0].Status.Conditions = nil }, finding: true,
			says: []string{"is not ready", "kubectl -n meshca-agents logs meshca-agent-4kx2p"}},
		"refused": {change: func(f *overview.Facts) {
			f.Pod.Name, f.Name, f.Pod.UID = "pay-5c66-qq9tz", "pay-5c66-qq9tz", "pay-5c66-qq9tz"
			f.Events = []overview.Event{
				{At: statusNow.Add(-time.Minute), Reason: "CertificateRefused", Message: "the pod is not known", Count: 7},
				{At: statusNow.Add(-time.Hour), Reason: "BackOff", Message: "x", Count: 1},
			}
		}, finding: true, says: []string{"CertificateRefused, 7 times, last 1 min ago: the pod is not known", "the CA refuses it a certificate", "mend what the CA's reason names"}},
		"mounted-after-all": {change: func(f *overview.Facts) {
			f.Events = []overview.Event{{At: statusNow.Add(-time.Minute), Reason: "FailedMount", Message: "driver not found", Count: 2}}
		}, says: []string{"none that still counts", "driver not found"}},
		"pending": {change: func(f *overview.Facts) {
			f.Pod.Status.Phase = core.PodPending
			f.Events = []overview.Event{{At: statusNow.Add(-time.Minute), Reason: "FailedMount", Message: "driver not found", Count: 2}}
		}, finding: true, says: []string{"could not be mounted", "driver not found"}},
		"unlisted":    {change: func(f *overview.Facts) { f.Pod.UID = "calm-1" }, says: []string{"the CA lists no details", "all holds"}},
		"unknown-pod": {change: func(f *overview.Facts) { f.Pod.UID = "lost" }, finding: true, says: []string{"no stream to the CA shows it", "look at the agent on node-1"}},
		"no-reports":  {change: func(f *overview.Facts) { f.Docs.Fresh = nil }, unknown: true, says: []string{"no replica of the CA reports"}},
		"forbidden": {change: func(f *overview.Facts) {
			f.Untold = map[string]error{"events": errors.New(`events is forbidden: User "eve" cannot list resource "events"`)}
		}, unknown: true, says: []string{`cannot list resource "events"`, "not all of it could be told"}},
		"no-policies": {change: func(f *overview.Facts) { f.Policies = nil }, says: []string{"PERMISSIVE, by no policy"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := good()
			tt.change(f)
			e := overview.Explain(f)
			if finding, unknown := e.Worst(); finding != tt.finding || unknown != tt.unknown {
				t.Errorf("finding %v, unknown %v", finding, unknown)
			}
			var b bytes.Buffer
			if err := (explainView{e, marksFor(func(string) string { return "C.UTF-8" })}).text(&b); err != nil {
				t.Fatal(err)
			}
			flat := strings.Join(strings.Fields(b.String()), " ")
			for _, words := range tt.says {
				if !strings.Contains(b.String(), words) && !strings.Contains(flat, words) {
					t.Errorf("%q is not said", words)
				}
			}
			for line := range strings.Lines(b.String()) {
				if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > columns {
					t.Errorf("%d columns: %s", n, line)
				}
			}
			golden(t, "explain-golden/"+name+".txt", b.String())
		})
	}
	data, err := json.MarshalIndent(overview.Explain(good()), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "explain-golden/good.json", string(data)+"\n")
}

func TestExplainCodes(t *testing.T) {
	code, out, errs := execute(t, "explain", "pl5")
	if code != 0 || !strings.HasPrefix(out, "PL5: a mode that gives way") || !strings.Contains(out, "what to do: ") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	if code, out, _ = execute(t, "explain", "ending_soon", "-o", "json"); code != 0 || !json.Valid([]byte(out)) {
		t.Errorf("%d %s", code, out)
	}
	for _, args := range [][]string{{"MC9999"}, {}, {"PL1", "PL2"}, {"pod"}, {"pod", "x"}, {"pod", "a/b/c"}, {"pod", "a/b", "-o", "x"}} {
		if code, _, errs := execute(t, append([]string{"explain"}, args...)...); code != 2 {
			t.Errorf("%v: %d %s", args, code, errs)
		}
	}
}
