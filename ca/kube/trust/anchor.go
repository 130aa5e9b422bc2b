package trust

import (
	"context"
	"crypto/x509"
	"fmt"
	"strconv"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"

	"github.com/meshca/meshca/identity"
)

// Anchor is an object that hands a bundle to others: whoever finds one knows that
// there is, or was, a root which agents and workloads believe.
type Anchor struct {
	Object      string
	Sequence    uint64
	Authorities []*x509.Certificate // none if what it holds cannot be read
	// Forget is what a person does who knows that nobody needs the root any more.
	Forget string
}

// forget removes the anchors of a mesh that is gone, those in other namespaces too,
// which a new root of the same trust domain would not get over.
const forget = "kubectl delete clustertrustbundle " + TrustBundleName + " --ignore-not-found && kubectl delete configmap -A --field-selector metadata.name=" + ConfigMapName

// Anchors returns what the cluster holds of a trust domain's anchors where only
// administrators write: the ConfigMap in the agents' namespace, and the
// ClusterTrustBundle. It does not look into other namespaces, whose tenants could
// then keep a CA from its first root. It needs list, by name, and nothing more.
func Anchors(ctx context.Context, client kubernetes.Interface, agents string, td identity.TrustDomain) ([]Anchor, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	named := func(name string) metav1.ListOptions {
		return metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()}
	}
	var all []Anchor
	add := func(k key, meta *metav1.ObjectMeta, text string) {
		if why := foreignTo(meta, td); why != "" {
			return
		}
		// What was edited vouches for no number and no authority, and tells of a root
		// all the same.
		sequence, _ := strconv.ParseUint(meta.Annotations[annotSequence], 10, 64)
		authorities, _ := identity.ParsePEM([]byte(text))
		all = append(all, Anchor{Object: k.String(), Sequence: sequence, Authorities: authorities, Forget: forget})
	}
	configMaps, err := client.CoreV1().ConfigMaps(agents).List(ctx, named(ConfigMapName))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", key{kindConfigMap, agents}, err)
	}
	for _, o := range configMaps.Items {
		add(key{kindConfigMap, agents}, &o.ObjectMeta, o.Data[ConfigMapKey])
	}
	bundles, err := client.CertificatesV1().ClusterTrustBundles().List(ctx, named(TrustBundleName))
	if apierrors.IsNotFound(err) {
		return all, nil // the API server does not serve the kind
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", key{kind: kindTrustBundle}, err)
	}
	for _, o := range bundles.Items {
		add(key{kind: kindTrustBundle}, &o.ObjectMeta, o.Spec.TrustBundle)
	}
	return all, nil
}
