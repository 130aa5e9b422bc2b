// Package trust hands the trust bundle to whoever needs an anchor before it has a
// certificate: the agents, for their connection to the CA, and pods that verify
// others by a file.
//
// [Distributor] writes, and keeps as they are:
//
//	ConfigMap meshca-root                    key root.pem, in the agents' namespace and in each
//	                                         namespace that is labelled meshca.dev/trust-bundle=enabled
//	                                         or meshca.dev/inject=enabled
//	ClusterTrustBundle meshca.dev:workload:root  signer meshca.dev/workload, where the API server
//	                                         serves certificates.k8s.io/v1
//	ConfigMap istio-ca-root-cert             key root-cert.pem, in the same namespaces and in those
//	                                         with Istio's injection; only with IstioCompatibility
//
// # Rules
//
// An object is ours if it says so: app.kubernetes.io/managed-by=meshca, or the
// annotation meshca.dev/trust-domain. Another's, and another trust domain's, is
// reported and never touched.
//
// It carries the bundle's sequence in the annotation meshca.dev/bundle-sequence. A
// bundle with a lower one never replaces a higher one (T12): it is written over
// exactly the version of the object that was judged, so that of two replicas that
// believe to lead the one that is behind fails. Creating goes under a field manager
// of the replica's own, without force, for the same reason. The one exception is
// istio-ca-root-cert, where both share a field manager in order never to need force:
// two that create it at one instant could leave the older bundle until the other
// sees it, some milliseconds later.
//
// One that carries another root of the trust domain under the same sequence is
// another CA's, such as of the root before the CA's namespace was lost: agents that
// hold it refuse our bundle. It is reported and left alone, until it is deleted or
// the sequence goes on.
//
// What is edited or deleted is put right. When a namespace loses its label its
// ConfigMap stays and is kept current, since pods may mount it; it goes when
// somebody deletes it, which then is not undone.
//
// istio-ca-root-cert is somebody else's in a cluster with istiod. It is written by
// server-side apply without force; on the first conflict that namespace is left
// alone and reported, until the object is gone. Nobody is fought with.
//
// Each kind is followed by itself. One that cannot be is reported for as long as that
// lasts, and keeps nothing from the others; the agents' namespace is served even while
// the list of namespaces is not to be had. ClusterTrustBundles are looked for again
// each minute where they are not served.
//
// # Permissions
//
// A ClusterRole. A create by server-side apply can be restricted by name.
//
//	namespaces           list, watch
//	configmaps           list, watch, create, patch  resourceNames meshca-root (istio-ca-root-cert)
//	clustertrustbundles  create, patch               resourceNames meshca.dev:workload:root
//	signers              attest                      resourceNames meshca.dev/workload
//
// Configmaps are of the core group, the last two of certificates.k8s.io. Every
// ServiceAccount may read ClusterTrustBundles as it is (the role
// system:cluster-trust-bundle-discovery). A current API server begins a watch with
// the list, and list is then not asked for. [Anchors] lists configmaps, by name.
package trust
