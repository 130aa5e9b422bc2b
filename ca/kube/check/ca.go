package check

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/report"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/roots"
)

// Labels of pods, which Deployment and DaemonSet select by.
const (
	caLabels    = "app.kubernetes.io/name=meshca,app.kubernetes.io/component=ca"
	agentLabels = "app.kubernetes.io/name=meshca,app.kubernetes.io/component=agent"
)

func (r *run) replicas(ctx context.Context) Result {
	d, err := r.readDeployment(ctx)
	if apierrors.IsNotFound(err) {
		return broken("apply the manifest or upgrade the release again", "there is no Deployment meshca in namespace %s", r.Namespace)
	}
	if err != nil {
		return unknown(fmt.Errorf("reading Deployment meshca in namespace %q: %w", r.Namespace, err))
	}
	want := int32(1)
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	pods, err := r.client.CoreV1().Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: caLabels})
	if err != nil {
		return unknown(fmt.Errorf("reading the pods of the CA: %w", err))
	}
	images, notReady := judgePods(pods.Items)
	look := fmt.Sprintf("kubectl -n %s get pods; kubectl -n %s logs deploy/meshca", r.Namespace, r.Namespace)
	ready := int32(len(pods.Items) - len(notReady))
	switch {
	case want == 0:
		return broken(fmt.Sprintf("kubectl -n %s scale deploy/meshca --replicas=2", r.Namespace), "it is scaled to 0 replicas: nothing signs")
	case ready == 0:
		return broken(look, "0 of %d can sign, by their readiness", want).about(notReady)
	case ready < want || len(notReady) > 0:
		return attention(look, "%d of %d can sign, by their readiness", ready, want).about(notReady)
	case d.Generation != d.Status.ObservedGeneration || d.Status.UpdatedReplicas < want || len(images) > 1:
		return attention("wait for the upgrade: kubectl -n "+r.Namespace+" rollout status deploy/meshca",
			"%d of %d can sign, in %s", ready, want, plural(len(images), "version")).about(images)
	}
	return holds("%d of %d can sign, by their readiness; %s", ready, want, strings.Join(images, ", "))
}

// judgePods returns which images pods run, and the pods that are not ready. Pods that
// are on their way out count as neither.
func judgePods(pods []corev1.Pod) (images, notReady []string) {
	seen := make(map[string]bool)
	for _, p := range pods {
		if p.DeletionTimestamp != nil {
			continue
		}
		for _, c := range p.Spec.Containers {
			seen[c.Image] = true
		}
		ready := slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
		if !ready {
			where := p.Spec.NodeName
			if where == "" {
				where = "no node"
			}
			notReady = append(notReady, fmt.Sprintf("%s/%s (%s): %s", p.Namespace, p.Name, where, why(&p)))
		}
	}
	return slices.Sorted(maps.Keys(seen)), notReady
}

// why says the first thing that is known to keep a pod from being ready.
func why(p *corev1.Pod) string {
	for _, s := range p.Status.ContainerStatuses {
		if w := s.State.Waiting; w != nil && w.Reason != "" {
			return w.Reason
		}
	}
	for _, c := range p.Status.Conditions {
		if c.Status == corev1.ConditionFalse && c.Reason != "" && (c.Type == corev1.PodScheduled || c.Type == corev1.PodReady) {
			return c.Reason
		}
	}
	return strings.ToLower(string(p.Status.Phase))
}

func (r *run) inspect(ctx context.Context) (*state.Inspection, error) {
	return r.inspection.get(func() (*state.Inspection, error) {
		return state.Inspect(ctx, r.client.CoreV1(), r.Namespace)
	})
}

// authority judges as the CA does, and as meshca backup does.
func (r *run) authority(ctx context.Context) Result {
	settings, err := r.readSettings(ctx)
	if err != nil {
		return unknown(err)
	}
	if len(settings.Upstream) > 0 {
		return r.foreignRoots(ctx)
	}
	in, err := r.inspect(ctx)
	switch {
	case apiFailed(err):
		return unknown(err)
	case errors.As(err, new(*state.NothingError)):
		return broken("see the CA's log: kubectl -n "+r.Namespace+" logs deploy/meshca", "%s", plain(err))
	case err != nil:
		return broken("the CA signs on with what it holds in memory while it runs; mend this before it restarts", "%s", plain(err))
	}
	s := in.State
	if s.Step != state.StepNone {
		return attention("follow it: meshca status", "they fit: %s, bundle %d, and a rotation of the root is at step %s", plural(len(s.Bundle), "root"), s.Sequence, s.Step)
	}
	return holds("they fit: trust domain %s, %s, bundle %d", in.TrustDomain, plural(len(s.Bundle), "root"), s.Sequence)
}

// foreignRoots is what there is of a root that is an upstream's.
func (r *run) foreignRoots(ctx context.Context) Result {
	switch _, err := r.client.CoreV1().ConfigMaps(r.Namespace).Get(ctx, state.MarkerName, metav1.GetOptions{}); {
	case err == nil:
		return broken("leave \"upstream\" out, or use another namespace for a new mesh",
			"the configuration names an upstream, and the mesh has a root of its own; moving from one to the other is not built yet")
	case !apierrors.IsNotFound(err):
		return unknown(fmt.Errorf("reading ConfigMap %s: %w", state.MarkerName, err))
	}
	in, err := r.recorded(ctx)
	switch {
	case apierrors.IsNotFound(err):
		return broken("see the CA's log: kubectl -n "+r.Namespace+" logs deploy/meshca", "the upstream's roots have never been handed out: there is no ConfigMap %s", recordName)
	case errors.As(err, new(*roots.CorruptError)):
		return broken("while a replica runs it puts it right within seconds; otherwise do what it says", "%s", plain(err))
	case err != nil:
		return unknown(err)
	}
	return holds("the root is an upstream's: trust domain %s, %s, bundle %d", in.TrustDomain, plural(len(in.Bundle.Authorities()), "root"), in.State.Sequence)
}

// recordName is the ConfigMap of package record, which is too deep to be imported here.
const recordName = "meshca-bundle"

// upstream is what the replicas say of who signs their intermediates.
func (r *run) upstream(ctx context.Context) Result {
	settings, err := r.readSettings(ctx)
	if err != nil {
		return unknown(err)
	}
	if len(settings.Upstream) == 0 {
		return holds("the root is the CA's own")
	}
	docs, err := report.Read(ctx, r.client.CoreV1().ConfigMaps(r.Namespace), r.serverTime)
	if err != nil {
		return unknown(err)
	}
	return judgeSources(docs.Fresh)
}

func judgeSources(docs []*report.Document) Result {
	var kind string
	var bad, notes []string
	told := 0
	for _, d := range docs {
		s := d.Source
		if s == nil {
			continue
		}
		told++
		kind = s.Kind
		if s.State != "ok" {
			bad = append(bad, fmt.Sprintf("%s: %s, signs until %s: %s", d.Replica, s.State, d.Signing.Until.UTC().Format("2006-01-02 15:04:05Z"), s.Detail))
		}
		for _, n := range s.Notes {
			if !slices.Contains(notes, n) {
				notes = append(notes, n)
			}
		}
	}
	switch {
	case told == 0:
		return Result{Status: Unknown, Found: "no replica tells of it", Next: "see MC0301"}
	case len(bad) > 0:
		return broken("do what it says; until then restart no CA: meshca status says until when they sign", "%s: %d of %s cannot have a new intermediate", kind, len(bad), plural(told, "CA")).about(bad)
	case len(notes) > 0:
		return attention("see docs/upstreams.md", "%s: it signs, and there is something to know", kind).about(notes)
	}
	return holds("%s signs for %s", kind, plural(told, "CA"))
}

// apiFailed tells an answer of the API server, or none, from a judgement of what was
// read.
func apiFailed(err error) bool {
	if err == nil {
		return false
	}
	for _, judged := range []any{
		new(*state.NothingError), new(*state.LostError), new(*state.CorruptError), new(*state.ReplacedError),
		new(*state.VersionError), new(*state.TrustDomainError), new(*state.RollbackError),
	} {
		if errors.As(err, judged) {
			return false
		}
	}
	return true
}

func (r *run) immutable(ctx context.Context) Result {
	settings, err := r.readSettings(ctx)
	if err != nil {
		return unknown(err)
	}
	if len(settings.Upstream) > 0 {
		return holds("there are none: the root is an upstream's")
	}
	in, err := r.inspect(ctx)
	if err != nil {
		return unknown(err)
	}
	if len(in.Changeable) > 0 {
		return broken(fmt.Sprintf("kubectl -n %s patch secret NAME -p '{\"immutable\":true}'", r.Namespace),
			"they could be edited, and a replica that starts would believe it").about(in.Changeable)
	}
	return holds("they are immutable")
}
