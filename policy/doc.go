// Package policy decides whether a workload's port takes mutual TLS only, both
// mutual TLS and plaintext, or plaintext only, with the meaning that Istio gives
// to PeerAuthentication.
//
// A [Set] is a compiled set of policies; [Set.Resolve] is the decision, and
// [Set.Explain] the decision with every policy that had a part in it or lost.
// The package is pure: it reads no file, no clock and writes no log. Policies in
// a directory are read by package policydir, and judged before they are in force
// by package lint.
package policy
