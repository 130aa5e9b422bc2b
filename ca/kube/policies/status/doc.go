// Package status tells the owners of PeerAuthentications what becomes of them: that
// a policy has no effect, and which one beats it, by a condition of the object's status
// and by events.
//
// A [Writer] is for the replica that leads. What it says is package lint's judgement,
// with the codes that "meshca policy lint" prints. It writes a condition only when it
// has another to write, the same to an object once in ten seconds at most, and never
// over a change that it has not seen.
//
// Where the definition of PeerAuthentication is not ours, or Istio has taken it over,
// it writes events only: the status is then for whoever owns the definition. That is
// the sign by which Istio counts as present. It needs no permission of its own, and
// holds from before istiod runs until after it is gone.
//
// # Permissions
//
//	peerauthentications.security.istio.io/status      patch    in the cluster
//	customresourcedefinitions.apiextensions.k8s.io    get      peerauthentications.security.istio.io
//
// and what package events needs.
package status
