// Package kubecheck tests against a real API server that meshca check tells what is
// wrong with a cluster and with an installation, and that meshca uninstall takes away
// what there is, in its order, and nothing while pods need it.
//
// What is installed is the manifest that users apply; roots, bundles and definition
// are made by the parts that make them in a CA. Pods are objects that no kubelet
// runs.
package kubecheck
