package overview

import (
	"context"
	"fmt"
	"time"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// Driver is the name of our CSI driver.
const Driver = "csi.meshca.dev"

// page is how many pods are read at a time: a whole cluster's in one answer are a
// burden to an API server.
const page = 500

// unfinished selects pods that have, or will have, an identity.
const unfinished = "status.phase!=Succeeded,status.phase!=Failed"

// Pod is one that mounts our volume.
type Pod struct {
	UID, Namespace, Name string
	ServiceAccount, Node string
	Running              bool // at least one of its containers has begun
	Created              time.Time
}

// Pods returns those of a namespace, or of all ("") that mount our volume and have a
// node. Seen is told how many were looked at.
func Pods(ctx context.Context, client typedcorev1.PodsGetter, namespace string, seen func(int)) ([]Pod, error) {
	var all []Pod
	total := 0
	o := metav1.ListOptions{Limit: page, FieldSelector: unfinished}
	for {
		list, err := client.Pods(namespace).List(ctx, o)
		if err != nil {
			return nil, fmt.Errorf("reading the cluster's pods: %w", err)
		}
		for i := range list.Items {
			p := &list.Items[i]
			if _, ok := volume(p); ok && p.Spec.NodeName != "" {
				all = append(all, Pod{
					UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.Spec.ServiceAccountName,
					Node: p.Spec.NodeName, Running: p.Status.Phase == core.PodRunning, Created: p.CreationTimestamp.Time,
				})
			}
		}
		total += len(list.Items)
		seen(total)
		if o.Continue = list.Continue; o.Continue == "" {
			return all, nil
		}
	}
}

// volume is the pod's volume of ours.
func volume(p *core.Pod) (core.Volume, bool) {
	for _, v := range p.Spec.Volumes {
		if v.CSI != nil && v.CSI.Driver == Driver {
			return v, true
		}
	}
	return core.Volume{}, false
}

// Replicas returns the names of the CA's pods.
func Replicas(ctx context.Context, client typedcorev1.PodsGetter, namespace string) ([]string, error) {
	list, err := client.Pods(namespace).List(ctx, metav1.ListOptions{
		FieldSelector: unfinished, LabelSelector: "app.kubernetes.io/name=meshca,app.kubernetes.io/component=ca",
	})
	if err != nil {
		return nil, fmt.Errorf("reading the CA's pods in namespace %q: %w", namespace, err)
	}
	var names []string
	for _, p := range list.Items {
		names = append(names, p.Name)
	}
	return names, nil
}
