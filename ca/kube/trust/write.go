package trust

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	applycertificatesv1 "k8s.io/client-go/applyconfigurations/certificates/v1"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"

	"github.com/meshca/meshca/identity"
)

// write puts the bundle into an object: over exactly the version that was judged,
// or where none was. One that was deleted since is not made again: its UID is demanded,
// since a version alone is not compared with nothing.
func (d *Distributor) write(ctx context.Context, k key, have *object, b *identity.Bundle) error {
	options := metav1.ApplyOptions{FieldManager: manager, Force: k.kind != kindIstio}
	var version string
	var uid types.UID
	if have != nil {
		version, uid = have.meta.ResourceVersion, have.meta.UID
	} else if k.kind != kindIstio {
		// There is no version to compare. A manager of its own, without force, has the
		// API server refuse where another replica has created other content.
		options = metav1.ApplyOptions{FieldManager: manager + "-" + d.conf.Replica}
	}
	if err := d.limit.Wait(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var err error
	if k.kind == kindTrustBundle {
		o := applycertificatesv1.ClusterTrustBundle(TrustBundleName).WithLabels(labels()).WithAnnotations(annotations(b)).
			WithSpec(applycertificatesv1.ClusterTrustBundleSpec().WithSignerName(SignerName).WithTrustBundle(string(b.MarshalPEM())))
		if version != "" {
			o = o.WithResourceVersion(version).WithUID(uid)
		}
		_, err = d.conf.Client.CertificatesV1().ClusterTrustBundles().Apply(ctx, o, options)
	} else {
		data := ConfigMapKey
		if k.kind == kindIstio {
			data = IstioKey
		}
		o := applycorev1.ConfigMap(k.name(), k.namespace).WithLabels(labels()).WithAnnotations(annotations(b)).
			WithData(map[string]string{data: string(b.MarshalPEM())})
		if version != "" {
			o = o.WithResourceVersion(version).WithUID(uid)
		}
		_, err = d.conf.Client.CoreV1().ConfigMaps(k.namespace).Apply(ctx, o, options)
	}
	result := "written"
	if apierrors.IsConflict(err) {
		result = "outrun"
	} else if err != nil {
		result = "failed"
	}
	d.metrics.writes.WithLabelValues(string(k.kind), result).Inc()
	if err != nil {
		return fmt.Errorf("writing bundle %d into %s: %w", b.Sequence(), k, err)
	}
	return nil
}

// held reports whether an apply was refused because others manage the fields. A
// version that was outrun is a conflict, too, and has no such cause.
func held(err error) bool {
	return apierrors.IsConflict(err) && apierrors.HasStatusCause(err, metav1.CauseTypeFieldManagerConflict)
}

// gone reports whether the namespace is not to be written to any more.
func gone(err error) bool {
	return apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause)
}
