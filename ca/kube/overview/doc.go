// Package overview is what operators see of a mesh that runs: a [Picture] of all
// workloads, and an [Explanation] of one. Both are made with the operator's own rights
// from what the CA's replicas report (package report) and from what the cluster has:
// the pods that mount our volume are those that should be there.
//
// # Permissions
//
// Those of whoever asks, and nothing is written:
//
//	configmaps           list  in the CA's namespace
//	pods                 list  in the CA's namespace, and of the cluster or the namespace asked for
//
// and for an explanation also
//
//	pods, csidrivers     get
//	pods, events         list  in the agents' and the pod's namespace
//	peerauthentications  list  in the pod's namespace and the root namespace
//
// What it does not do: it renders nothing and knows no terminal.
package overview
