package volumes

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/pager"
)

// Driver is the name of the CSI driver.
const Driver = "csi.meshca.dev"

// unmounting is how long after its end a pod may still have its volume: the kubelet
// says that a pod has finished before it takes the volumes away.
const unmounting = time.Minute

// pageSize bounds what one answer of the API server holds.
const pageSize = 500

// Of returns a pod's volumes of our driver.
func Of(p *corev1.Pod) []corev1.Volume {
	var ours []corev1.Volume
	for _, v := range p.Spec.Volumes {
		if v.CSI != nil && v.CSI.Driver == Driver {
			ours = append(ours, v)
		}
	}
	return ours
}

// Finished reports whether a pod's containers have ended for good.
func Finished(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// Uses reports whether a pod has our volume, or will have it, or may still.
func Uses(p *corev1.Pod, now time.Time) bool {
	if len(Of(p)) == 0 {
		return false
	}
	return !Finished(p) || now.Sub(ended(p)) < unmounting
}

// ended is when the last container ended, as far as is told.
func ended(p *corev1.Pod) time.Time {
	var last time.Time
	for _, statuses := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for _, s := range statuses {
			if t := s.State.Terminated; t != nil && t.FinishedAt.After(last) {
				last = t.FinishedAt.Time
			}
		}
	}
	return last
}

// Pod names a pod, and what is to be known of it.
type Pod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Node      string `json:"node,omitempty"` // empty: not on a node yet
	Ending    bool   `json:"ending,omitempty"`
}

func (p Pod) String() string { return p.Namespace + "/" + p.Name }

// Each calls do with each pod of the cluster.
func Each(ctx context.Context, client kubernetes.Interface, do func(*corev1.Pod)) error {
	list := pager.New(pager.SimplePageFunc(func(o metav1.ListOptions) (runtime.Object, error) {
		return client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, o)
	}))
	list.PageSize = pageSize
	err := list.EachListItem(ctx, metav1.ListOptions{}, func(o runtime.Object) error {
		do(o.(*corev1.Pod))
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the pods of all namespaces: %w", err)
	}
	return nil
}

// Users are the pods that have our volume, will have it or may still have it, by
// name.
func Users(ctx context.Context, client kubernetes.Interface, now time.Time) ([]Pod, error) {
	users := []Pod{}
	err := Each(ctx, client, func(p *corev1.Pod) {
		if Uses(p, now) {
			users = append(users, Pod{p.Namespace, p.Name, p.Spec.NodeName, p.DeletionTimestamp != nil})
		}
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(users, func(a, b Pod) int { return strings.Compare(a.String(), b.String()) })
	return users, nil
}
