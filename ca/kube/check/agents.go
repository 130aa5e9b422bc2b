package check

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/volumes"
)

const again = "apply the manifest or upgrade the release again"

func (r *run) readAgents(ctx context.Context) ([]corev1.Pod, error) {
	list, err := r.client.CoreV1().Pods(r.AgentsNamespace).List(ctx, metav1.ListOptions{LabelSelector: agentLabels})
	if err != nil {
		return nil, fmt.Errorf("reading the agents' pods: %w", err)
	}
	return list.Items, nil
}

func (r *run) agents(ctx context.Context) Result {
	d, err := r.readDaemonSet(ctx)
	if apierrors.IsNotFound(err) {
		return broken(again, "there is no DaemonSet meshca-agent in namespace %s", r.AgentsNamespace)
	}
	if err != nil {
		return unknown(fmt.Errorf("reading DaemonSet meshca-agent in namespace %q: %w", r.AgentsNamespace, err))
	}
	pods, err := r.readAgents(ctx)
	if err != nil {
		return unknown(err)
	}
	nodes, err := r.readNodes(ctx)
	if err != nil {
		return unknown(err)
	}
	images, notReady := judgePods(pods)
	running := make(map[string]bool)
	for _, p := range pods {
		if p.DeletionTimestamp == nil {
			running[p.Spec.NodeName] = true
		}
	}
	wanted := 0
	var without []string
	for _, n := range nodes {
		if !selects(d.Spec.Template.Spec.NodeSelector, n.Labels) {
			continue
		}
		wanted++
		if !running[n.Name] {
			without = append(without, n.Name+": no agent")
		}
	}
	look := fmt.Sprintf("kubectl -n %s describe ds/meshca-agent; kubectl -n %s logs ds/meshca-agent", r.AgentsNamespace, r.AgentsNamespace)
	if bad := append(without, notReady...); len(bad) > 0 {
		slices.Sort(bad)
		return broken(look, "on %d of %d nodes there is no agent that is ready: pods there wait at their start", len(bad), wanted).about(bad)
	}
	if len(images) > 1 {
		return attention(fmt.Sprintf("wait for the upgrade: kubectl -n %s rollout status ds/meshca-agent", r.AgentsNamespace),
			"ready on all %s, in %d versions", plural(wanted, "node"), len(images)).about(images)
	}
	return holds("ready on %s; %s", plural(wanted, "node"), strings.Join(images, ", "))
}

// selects is what a node selector means. Tolerations and affinity are not judged
// here: a node that those leave out is one that pods with a volume may still be put
// on.
func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// driver judges what the kubelet goes by. Some of it only fails to work if it is
// wrong; without serviceAccountTokenInSecrets tokens are passed where they are
// logged.
func (r *run) driver(ctx context.Context) Result {
	d, err := r.client.StorageV1().CSIDrivers().Get(ctx, volumes.Driver, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return broken(again, "there is none named %s: kubelets pass no token, and no pod gets an identity", volumes.Driver)
	}
	if err != nil {
		return unknown(fmt.Errorf("reading CSIDriver %s: %w", volumes.Driver, err))
	}
	wrong := driverFaults(&d.Spec)
	if len(wrong) > 0 {
		return broken("delete the CSIDriver and "+again+"; pods that run keep their identity meanwhile",
			"settings that are wrong: %d", len(wrong)).about(wrong)
	}
	return holds("%s, with all settings as they must be", volumes.Driver)
}

func driverFaults(s *storagev1.CSIDriverSpec) (wrong []string) {
	is := func(b *bool) bool { return b != nil && *b }
	must := func(ok bool, text string) {
		if !ok {
			wrong = append(wrong, text)
		}
	}
	must(is(s.ServiceAccountTokenInSecrets), "serviceAccountTokenInSecrets is not true: pods' tokens are passed where they get into logs")
	must(is(s.RequiresRepublish), "requiresRepublish is not true: agents get no fresh tokens, and renewal ends after an hour")
	must(is(s.PodInfoOnMount), "podInfoOnMount is not true: agents are not told which pod a volume is for")
	must(s.AttachRequired == nil || !*s.AttachRequired, "attachRequired is true: pods wait for an attachment that nobody makes")
	must(slices.Equal(s.VolumeLifecycleModes, []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecycleEphemeral}),
		fmt.Sprintf("volumeLifecycleModes is %v, not [Ephemeral]: a volume must not outlive its pod", s.VolumeLifecycleModes))
	var audiences []string
	for _, t := range s.TokenRequests {
		audiences = append(audiences, t.Audience)
	}
	must(slices.Contains(audiences, "meshca"), fmt.Sprintf("tokenRequests has audiences %q, and not %q", audiences, "meshca"))
	for _, a := range audiences {
		must(a == "meshca", fmt.Sprintf("tokenRequests has the audience %q beside: agents would hold tokens of pods that open something else", a))
	}
	return wrong
}

// registered judges what kubelets know: an agent that runs and has not registered is
// none to them.
func (r *run) registered(ctx context.Context) Result {
	pods, err := r.readAgents(ctx)
	if err != nil {
		return unknown(err)
	}
	list, err := r.client.StorageV1().CSINodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return unknown(fmt.Errorf("reading CSINodes: %w", err))
	}
	knows := make(map[string]bool)
	for _, n := range list.Items {
		knows[n.Name] = slices.ContainsFunc(n.Spec.Drivers, func(d storagev1.CSINodeDriver) bool { return d.Name == volumes.Driver })
	}
	var lacks []string
	for _, p := range pods {
		if p.Spec.NodeName != "" && p.DeletionTimestamp == nil && !knows[p.Spec.NodeName] {
			lacks = append(lacks, p.Spec.NodeName)
		}
	}
	if len(lacks) > 0 {
		slices.Sort(lacks)
		return broken("is the kubelet's folder another than agent.kubeletDir? kubectl -n "+r.AgentsNamespace+" logs ds/meshca-agent",
			"the kubelets of %d of %d nodes with an agent do not know it", len(lacks), len(pods)).about(lacks)
	}
	return holds("by the kubelets of %s", plural(len(pods), "node"))
}
