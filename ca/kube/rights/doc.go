// Package rights is the one list of what the CA may do in a cluster.
//
// [CA] says it right by right, which is how the API server can be asked about it.
// The chart grants exactly these, and a test holds the two against each other; the
// packages below ca/kube say what each is for. The agents have none.
package rights
