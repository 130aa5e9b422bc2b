// Package uninstall takes away what the chart or the manifest has installed.
//
// [Run] refuses while a pod has a volume of ours: its certificate would not be
// renewed any more, and it could not end, since the kubelet would have nobody to take
// the volume away. [Wait] waits until there is none.
//
// # Order
//
//	1 the agents: DaemonSet, and its pods gone
//	2 CSIDriver and what else is the agents'
//	3 the CA: Deployment, and its pods gone, since a CA that runs puts things back
//	4 what else is the CA's
//	5 only if asked for: trust bundles, Secrets of roots, shared state, and last the
//	  marker, which tells as long as it is there that there was a root
//
// Everything can be repeated after whatever went wrong. Kept in any case are the
// namespaces, the definition of PeerAuthentication with all policies, and what has a
// name of ours and is somebody else's. What is deleted is exactly what was looked at,
// by its UID.
//
// # Permissions
//
// Of the person who uninstalls: list on pods; get and delete on what is listed in
// package installed; get and delete on the Lease; with the root, get on the marker and
// delete on Secrets, ConfigMaps and ClusterTrustBundles.
package uninstall
