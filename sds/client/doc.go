// Package client gets a workload's identity from the agent's socket: its SVID
// and the trust bundles, over the SPIFFE Workload API, for as long as the program
// runs.
//
// A [Source] holds what came last and was sound. An agent that restarts, stalls
// or sends nonsense takes nothing away; a certificate that ends for lack of a
// newer one is noticed by whoever is shown it. Only what the agent itself no
// longer sends, such as another domain's bundle, goes.
//
// A [PolicySource] beside it holds the policy that the agent hands on from the CA,
// by the same rule: it is replaced by a newer one, and never taken away.
//
// It takes the first SVID that the agent sends, which is the default one, and
// speaks the X.509 profile alone.
package client
