// Package kubestate tests against a real API server that the CA's root and shared
// state survive whatever happens to replicas, requests and objects.
package kubestate
