// Package kube tests against a real Kubernetes API server: its tokens, its keys
// and its way of saying no.
package kube
