// Package leader lets one of several replicas do work that need not be done twice.
//
// A lease saves work and fences nothing: a leader that was stopped and goes on
// still believes in its lease, and two can be at work for a while. What [Run]
// runs must be right then too, by having the API server compare what it replaces.
//
// # Permissions
//
// In the namespace of the lease:
//
//	leases.coordination.k8s.io  create
//	leases.coordination.k8s.io  get, update  resourceNames: the lease
package leader
