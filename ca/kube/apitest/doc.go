// Package apitest stands in for a Kubernetes API server where a real one cannot be
// brought to do what a test needs: to lag by 20 s, to be away for an hour of an
// injected clock, to say something absurd. An [API] keeps core objects in memory
// and answers get, list and watch of them, without a network, so that it works in a
// synctest bubble. Everything that a real one can be brought to do is tested with
// a real one, in test/interop/kube.
package apitest
