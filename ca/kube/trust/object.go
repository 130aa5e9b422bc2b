package trust

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

// Names that others see.
const (
	ConfigMapName   = "meshca-root"
	ConfigMapKey    = "root.pem"
	TrustBundleName = "meshca.dev:workload:root"
	SignerName      = "meshca.dev/workload"
	IstioName       = "istio-ca-root-cert"
	IstioKey        = "root-cert.pem"

	labelBundle    = "meshca.dev/trust-bundle" // of namespaces, as is the next
	labelInject    = "meshca.dev/inject"
	labelIstio     = "istio-injection"
	labelIstioRev  = "istio.io/rev"
	enabled        = "enabled"
	labelManagedBy = "app.kubernetes.io/managed-by"
	annotDomain    = "meshca.dev/trust-domain"
	annotSequence  = "meshca.dev/bundle-sequence"
	manager        = "meshca"
)

// kind is which of the objects.
type kind string

const (
	kindConfigMap   kind = "configmap"
	kindTrustBundle kind = "clustertrustbundle"
	kindIstio       kind = "istio_configmap"
)

// key names one object.
type key struct {
	kind      kind
	namespace string // empty for the ClusterTrustBundle
}

func (k key) name() string {
	switch k.kind {
	case kindTrustBundle:
		return TrustBundleName
	case kindIstio:
		return IstioName
	}
	return ConfigMapName
}

func (k key) String() string {
	if k.kind == kindTrustBundle {
		return "ClusterTrustBundle " + TrustBundleName
	}
	return fmt.Sprintf("ConfigMap %s in namespace %q", k.name(), k.namespace)
}

// object is what was found under a key.
type object struct {
	meta *metav1.ObjectMeta
	text string // the anchors
}

// condition is how an object stands.
type condition string

const (
	current   condition = "current"
	foreign   condition = "foreign"  // somebody else's; left alone
	conflict  condition = "conflict" // another writer or CA holds it; left alone
	newer     condition = "newer"    // carries a bundle that we do not know yet; left alone
	failing   condition = "failing"  // could not be written; tried again
	unwritten condition = "unwritten"
)

var conditions = []condition{current, foreign, conflict, newer, failing}

// judge says how an object stands to the bundle, and why, where it is left alone.
// unwritten means that it is to be written.
func judge(have *object, b *identity.Bundle) (condition, string) {
	if have == nil {
		return unwritten, ""
	}
	if why := foreignTo(have.meta, b.TrustDomain()); why != "" {
		return foreign, why
	}
	domain, sequence := have.meta.Annotations[annotDomain], have.meta.Annotations[annotSequence]
	// A number that is none was edited, and vouches for nothing.
	n, _ := strconv.ParseUint(sequence, 10, 64)
	if n > b.Sequence() {
		return newer, fmt.Sprintf("it carries bundle %d, and this replica knows %d: another replica is ahead, or the CA was restored from an older backup (meshca restore --as-newest)", n, b.Sequence())
	}
	if n == b.Sequence() && domain != "" && have.text == string(b.MarshalPEM()) && have.meta.Labels[labelManagedBy] == manager {
		return current, ""
	}
	if n == b.Sequence() && domain != "" {
		if other := rivals(have.text, b); other != "" {
			return conflict, fmt.Sprintf("it carries other authorities as bundle %d than this CA, whose SHA-256 begins with %s: another root was made for the trust domain, or somebody has edited it; agents refuse this CA's bundle. If the other root is the one to keep, bring it back: meshca restore. If this CA's is, delete the object, and it is made again",
				n, other)
		}
	}
	return unwritten, ""
}

// foreignTo says why an object is not of this trust domain's CA, and nothing if it is.
func foreignTo(meta *metav1.ObjectMeta, td identity.TrustDomain) string {
	domain := meta.Annotations[annotDomain]
	switch {
	case meta.Labels[labelManagedBy] != manager && domain == "":
		return "it is not meshca's: it has neither the label " + labelManagedBy + "=" + manager + " nor the annotation " + annotDomain + "; delete it if it is not needed"
	case domain != "" && domain != td.String():
		return fmt.Sprintf("it is of trust domain %q, and this CA is of %q; delete it if that CA is gone", domain, td)
	}
	return ""
}

// rivals returns fingerprints of the roots of b's trust domain in a text that b does
// not know, and nothing if there are none, as where the text was merely damaged. Two
// bundles under one number are two CAs, neither of which may take the other's
// anchors: agents that hold one refuse the other.
func rivals(text string, b *identity.Bundle) string {
	var unknown []string
	certs, _ := identity.ParsePEM([]byte(text))
	for _, c := range certs {
		root, err := ca.ParseRootCertificate(identity.EncodePEM(c), b.TrustDomain())
		if err == nil && !slices.ContainsFunc(b.Authorities(), root.Equal) {
			sum := sha256.Sum256(root.Raw)
			unknown = append(unknown, hex.EncodeToString(sum[:8]))
		}
	}
	return strings.Join(unknown, ", ")
}

func labels() map[string]string { return map[string]string{labelManagedBy: manager} }

func annotations(b *identity.Bundle) map[string]string {
	return map[string]string{
		annotDomain:   b.TrustDomain().String(),
		annotSequence: strconv.FormatUint(b.Sequence(), 10),
	}
}

// wants reports whether a namespace asks for an object.
func (d *Distributor) wants(ns *corev1.Namespace, k kind) bool {
	if k == kindIstio && !ending(ns) && (ns.Labels[labelIstio] == enabled || ns.Labels[labelIstioRev] != "") {
		return true
	}
	return Wants(ns, d.conf.Namespace)
}

// Wants reports whether a namespace gets the ConfigMap: the agents' does, and each
// that asks for it and is not being deleted.
func Wants(ns *corev1.Namespace, agents string) bool {
	return !ending(ns) && (ns.Name == agents || ns.Labels[labelBundle] == enabled || ns.Labels[labelInject] == enabled)
}

func ending(ns *corev1.Namespace) bool {
	return ns.Status.Phase == corev1.NamespaceTerminating || ns.DeletionTimestamp != nil
}

// Carried says which bundle an object carries by its own account, and whether it is
// an object of ours at all.
func Carried(meta *metav1.ObjectMeta) (domain string, sequence uint64, ours bool) {
	domain = meta.Annotations[annotDomain]
	sequence, _ = strconv.ParseUint(meta.Annotations[annotSequence], 10, 64) // one that is none vouches for nothing
	return domain, sequence, meta.Labels[labelManagedBy] == manager || domain != ""
}
