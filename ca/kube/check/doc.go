// Package check judges a cluster before meshca is installed into it, and an
// installation afterwards, by reading what the person who asks may read.
//
// [Run] is its one entry and returns a [Report], one [Result] for each check, in the
// order of their codes ([Codes]), which docs/findings.md explains. It changes
// nothing. What could not be read is [Unknown] and never [Holds].
//
// # What is asked of the API server
//
// Reads, SelfSubjectAccessReviews for those reads, and SubjectAccessReviews about
// the CA's ServiceAccount. To see what tokens of this cluster say, one is asked for,
// for a running pod of the CA, with an audience that nothing accepts; it is read in
// memory, and goes nowhere. Whether the CA can sign is what its readiness says; it is
// not proved anew, since that takes a token that the CA accepts.
package check
