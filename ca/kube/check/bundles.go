package check

import (
	"context"
	"errors"
	"fmt"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/ca/roots"
)

// expected returns what the state says to believe. Where the roots may not be read,
// sequences still tell.
func (r *run) expected(ctx context.Context) (*state.Inspection, error) {
	settings, err := r.readSettings(ctx)
	if err != nil {
		return nil, err
	}
	if len(settings.Upstream) > 0 {
		return r.recorded(ctx)
	}
	in, err := r.inspect(ctx)
	if in != nil && errors.As(err, new(*state.RootsError)) {
		return in, nil
	}
	return in, err
}

// recorded is what a mesh with an upstream's root was told.
func (r *run) recorded(ctx context.Context) (*state.Inspection, error) {
	cm, err := r.client.CoreV1().ConfigMaps(r.Namespace).Get(ctx, recordName, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("reading ConfigMap %s: %w", recordName, err)
	}
	bundle, err := roots.ReadBundle([]byte(cm.Data[roots.FileName]))
	if err != nil {
		return nil, fmt.Errorf("reading ConfigMap %s: %w", recordName, err)
	}
	return &state.Inspection{TrustDomain: bundle.TrustDomain(), State: state.State{Sequence: bundle.Sequence()}, Bundle: bundle}, nil
}

func (r *run) bundles(ctx context.Context) Result {
	in, err := r.expected(ctx)
	if err != nil {
		return unknown(err)
	}
	namespaces, err := r.readNamespaces(ctx)
	if err != nil {
		return unknown(err)
	}
	list, err := r.client.CoreV1().ConfigMaps(metav1.NamespaceAll).List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + trust.ConfigMapName})
	if err != nil {
		return unknown(fmt.Errorf("reading the ConfigMaps %s of all namespaces: %w", trust.ConfigMapName, err))
	}
	faults := make(map[string]string)
	wanted := 0
	for _, ns := range namespaces {
		if trust.Wants(&ns, r.AgentsNamespace) {
			wanted++
			faults[ns.Name] = "it is missing"
		}
	}
	for _, cm := range list.Items {
		if _, want := faults[cm.Namespace]; want {
			faults[cm.Namespace] = fault(&cm.ObjectMeta, cm.Data[trust.ConfigMapKey], in)
		}
	}
	var bad []string
	for ns, text := range faults {
		if text != "" {
			bad = append(bad, ns+": "+text)
		}
	}
	if len(bad) > 0 {
		slices.Sort(bad)
		return broken("the CA that leads puts it right within seconds; if it does not: kubectl -n "+r.Namespace+" logs deploy/meshca",
			"ConfigMap %s is not right in %d of %d namespaces", trust.ConfigMapName, len(bad), wanted).about(bad)
	}
	return holds("bundle %d in %s", in.State.Sequence, plural(wanted, "namespace"))
}

// fault says what is wrong with an object that carries the bundle.
func fault(meta *metav1.ObjectMeta, text string, in *state.Inspection) string {
	domain, sequence, ours := trust.Carried(meta)
	switch {
	case !ours:
		return "it is somebody else's, and left alone"
	case domain != in.TrustDomain.String():
		return fmt.Sprintf("it is of trust domain %q", domain)
	case sequence != in.State.Sequence:
		return fmt.Sprintf("it carries bundle %d, and the state says %d", sequence, in.State.Sequence)
	case in.Bundle != nil && text != string(in.Bundle.MarshalPEM()):
		return fmt.Sprintf("it says that it carries bundle %d, and has other roots", sequence)
	}
	return ""
}

func (r *run) clusterBundle(ctx context.Context) Result {
	served, err := r.serves(groupCertificates, "clustertrustbundles")
	if err != nil {
		return unknown(err)
	}
	if !served {
		return holds("ClusterTrustBundle v1 is not served, and not needed")
	}
	in, err := r.expected(ctx)
	if err != nil {
		return unknown(err)
	}
	look := "the CA that leads puts it right within seconds; if it does not: kubectl -n " + r.Namespace + " logs deploy/meshca"
	b, err := r.client.CertificatesV1().ClusterTrustBundles().Get(ctx, trust.TrustBundleName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return broken(look, "ClusterTrustBundle %s is missing", trust.TrustBundleName)
	}
	if err != nil {
		return unknown(fmt.Errorf("reading ClusterTrustBundle %s: %w", trust.TrustBundleName, err))
	}
	if text := fault(&b.ObjectMeta, b.Spec.TrustBundle, in); text != "" {
		return broken(look, "ClusterTrustBundle %s: %s", trust.TrustBundleName, text)
	}
	return holds("bundle %d", in.State.Sequence)
}
