package uninstall

import (
	"context"
	"errors"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshca/meshca/ca/kube/installed"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/trust"
)

func resource(group, name string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: group, Version: "v1", Resource: name}
}

// lookRoot finds what belongs to the root, if it is to be deleted: what carries its
// bundle, its keys, the state, and last the marker, by which a second try finds the
// rest. The trust domain is what the marker says.
func (r *run) lookRoot(ctx context.Context) ([]found, error) {
	if r.DeleteRoot == "" {
		return nil, nil
	}
	// The marker alone: that roots are lost, or that the state does not fit, is no
	// reason to keep the rest.
	marker, err := state.ReadMarker(ctx, r.Client.CoreV1(), r.Namespace)
	if errors.As(err, new(*state.NothingError)) {
		return nil, nil // nothing is left of it
	}
	if err != nil {
		return nil, fmt.Errorf("finding out which root would be deleted: %w", err)
	}
	if marker.TrustDomain != r.DeleteRoot {
		return nil, &DomainError{Typed: r.DeleteRoot, Held: marker.TrustDomain}
	}
	there, err := r.lookBundles(ctx, marker.TrustDomain)
	if err != nil {
		return nil, err
	}
	// One more than the marker knows: a root is made before the marker tells of it.
	for n := 1; n <= len(marker.Roots)+1; n++ {
		if err := r.add(ctx, &there, "Secret", resource("", "secrets"), state.SecretName(n)); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{"meshca-policies", state.StateName, state.MarkerName} {
		if err := r.add(ctx, &there, "ConfigMap", resource("", "configmaps"), name); err != nil {
			return nil, err
		}
	}
	return there, nil
}

func (r *run) add(ctx context.Context, there *[]found, kind string, of schema.GroupVersionResource, name string) error {
	o := installed.Object{Part: installed.CA, Kind: kind, Resource: of, Namespace: r.Namespace, Name: name}
	u, err := r.get(ctx, o)
	if err == nil && u != nil {
		*there = append(*there, found{o, u})
	}
	return err
}

// lookBundles finds the objects that carry the bundle. While the root is kept so are
// they: what they say stays true, and pods may mount them.
func (r *run) lookBundles(ctx context.Context, domain string) ([]found, error) {
	var there []found
	configMaps := resource("", "configmaps")
	list, err := r.Objects.Resource(configMaps).List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + trust.ConfigMapName})
	if err != nil {
		return nil, fmt.Errorf("reading the ConfigMaps %s of all namespaces: %w", trust.ConfigMapName, err)
	}
	for _, u := range list.Items {
		o := installed.Object{Part: installed.CA, Kind: "ConfigMap", Resource: configMaps, Namespace: u.GetNamespace(), Name: u.GetName()}
		meta := &metav1.ObjectMeta{Labels: u.GetLabels(), Annotations: u.GetAnnotations()}
		if of, _, ours := trust.Carried(meta); !ours || of != domain {
			r.result.Foreign = append(r.result.Foreign, o.String())
			continue
		}
		there = append(there, found{o, &u})
	}
	o := installed.Object{Part: installed.CA, Kind: "ClusterTrustBundle", Resource: resource("certificates.k8s.io", "clustertrustbundles"), Name: trust.TrustBundleName}
	u, err := r.get(ctx, o)
	if err != nil || u == nil {
		return there, err
	}
	meta := &metav1.ObjectMeta{Labels: u.GetLabels(), Annotations: u.GetAnnotations()}
	if of, _, ours := trust.Carried(meta); !ours || of != domain {
		r.result.Foreign = append(r.result.Foreign, o.String())
		return there, nil
	}
	return append(there, found{o, u}), nil
}
