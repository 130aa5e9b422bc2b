// Package kubetest runs a real Kubernetes API server with its etcd on
// loopback, for tests that need tokens and keys that we did not make.
//
// [Start] brings up a [Cluster]; its methods create namespaces,
// ServiceAccounts, nodes and pods, and ask the TokenRequest API for tokens.
// They speak plain HTTP and JSON, so that client-go is linked nowhere.
//
// There is no kubelet, no scheduler and no controller: a pod is an object
// bound to a node object and never runs, and nothing creates the "default"
// ServiceAccounts. That is all that tokens need.
package kubetest
