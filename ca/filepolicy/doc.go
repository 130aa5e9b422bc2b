// Package filepolicy says what PeerAuthentication holds for each workload, from
// files on the CA's side: policies from a directory (package policydir), and from
// one more file the labels by which they select.
//
// [Source] is what package server asks. Labels never come from the agent: whoever
// could choose its own would choose its policies. What either file said last stays
// when it cannot be read any more; what was never known is not guessed. In a cluster
// the API server takes the place of both, and of this package.
package filepolicy
