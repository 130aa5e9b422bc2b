// Package testenv brings the programs that the tests run against but that we
// did not write: Kubernetes' API server with etcd, and Envoy.
//
// [Kubernetes] and [Envoy] return paths of binaries in a [Cache] outside the
// checkout, filling it first where it must be. What goes in is pinned in this
// repository, by go.sum or by SHA-256, and is checked. [Start] runs such a
// program and ends it again, by its own process id.
//
// The package knows nothing about how the programs are configured: that is
// what test/kubetest and test/envoytest are for.
package testenv
