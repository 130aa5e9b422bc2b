package e2e

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	authv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// TestT3_TheAgentMayDoNothing holds the agent to what the README says of it: no right
// in Kubernetes, no privilege on its node beyond three of the kubelet's folders.
func TestT3_TheAgentMayDoNothing(t *testing.T) {
	// What every ServiceAccount of a cluster may do is what one without any binding may.
	anybody := rights(t, "system:serviceaccount:default:nobody", "default")
	if got := rights(t, "system:serviceaccount:meshca-agents:meshca-agent", "meshca-agents"); !slices.Equal(got, anybody) {
		t.Errorf("the agent may do\n%s\nand anybody\n%s", strings.Join(got, "\n"), strings.Join(anybody, "\n"))
	}
	pods, err := client.CoreV1().Pods("meshca-agents").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(pods.Items) == 0 {
		t.Fatalf("the agents: %v, %v", pods, err)
	}
	spec := pods.Items[0].Spec
	if spec.HostNetwork || spec.HostPID || spec.HostIPC || spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		t.Errorf("the agent has a namespace of the host, or a token for the API server: %+v", spec)
	}
	for _, c := range spec.Containers {
		sc := c.SecurityContext
		if sc == nil || sc.Privileged != nil || sc.AllowPrivilegeEscalation == nil || *sc.AllowPrivilegeEscalation ||
			sc.ReadOnlyRootFilesystem == nil || !*sc.ReadOnlyRootFilesystem || sc.Capabilities == nil ||
			!slices.Equal(sc.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(sc.Capabilities.Add) > 0 {
			t.Errorf("container %s: %+v", c.Name, sc)
		}
	}
	for _, v := range spec.Volumes {
		for _, s := range projections(v) {
			if s.ServiceAccountToken != nil && s.ServiceAccountToken.Audience != "meshca" {
				t.Errorf("volume %s brings a token for %q", v.Name, s.ServiceAccountToken.Audience)
			}
		}
	}
}

func projections(v corev1.Volume) []corev1.VolumeProjection {
	if v.Projected == nil {
		return nil
	}
	return v.Projected.Sources
}

// rights lists what a user may do in a namespace, as the API server says.
func rights(t *testing.T, user, namespace string) []string {
	t.Helper()
	as := rest.CopyConfig(config)
	as.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + namespace, "system:authenticated"}}
	c, err := kubernetes.NewForConfig(as)
	if err != nil {
		t.Fatal(err)
	}
	review, err := c.AuthorizationV1().SelfSubjectRulesReviews().Create(t.Context(),
		&authv1.SelfSubjectRulesReview{Spec: authv1.SelfSubjectRulesReviewSpec{Namespace: namespace}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, r := range review.Status.ResourceRules {
		all = append(all, strings.Join(r.Verbs, ",")+" "+strings.Join(r.APIGroups, ",")+"/"+strings.Join(r.Resources, ",")+" "+strings.Join(r.ResourceNames, ","))
	}
	for _, r := range review.Status.NonResourceRules {
		all = append(all, strings.Join(r.Verbs, ",")+" "+strings.Join(r.NonResourceURLs, ","))
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// TestFailedMountSaysWhatToDo is what somebody sees who has written a pod wrongly.
func TestFailedMountSaysWhatToDo(t *testing.T) {
	ns := namespace(t)
	spec := app(ns, "writable", "default", true)
	spec.Spec.Volumes[0].CSI.ReadOnly = nil
	if _, err := client.CoreV1().Pods(ns).Create(t.Context(), spec, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "an event that says why", func(ctx context.Context) error {
		events, err := client.CoreV1().Events(ns).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=writable,reason=FailedMount"})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if strings.Contains(e.Message, "readOnly: true") {
				return nil
			}
			err = errors.New(e.Message)
		}
		return errors.Join(errors.New("no event names readOnly"), err)
	})
}
