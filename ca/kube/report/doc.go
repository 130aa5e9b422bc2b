// Package report is how the CA's replicas tell operators what they know. A [Publisher]
// writes a [Document] into a ConfigMap of the CA's namespace; [Read] returns those that
// are fresh, for "meshca status" and whoever else has a kubeconfig.
//
// # Which ConfigMap
//
// One of meshca-replica-1 to meshca-replica-16 ([Slots]). A replica takes the first
// that does not exist, was given up, or has been silent for a minute by its own clock,
// and keeps it. The API server decides between two: each write replaces exactly the
// version that the writer has seen, and whoever loses a slot looks for another. So there
// is nothing to list, nothing to collect and nothing to delete, names are known
// beforehand, and what stays behind is one small object.
//
// # Permissions
//
// In the CA's own namespace:
//
//	configmaps  create
//	configmaps  get, update  resourceNames: meshca-replica-1 … meshca-replica-16
//
// A create cannot be restricted by name; the CA has it for its state already. With
// names made from pods' names, update would have to be for every ConfigMap of the
// namespace, the CA's settings among them, and delete as well.
//
// # What it costs
//
// One update each 5 s and replica, or each 10 s while the document is over 64 KiB;
// nothing reads or watches them until somebody asks. A document has 1 KiB, some 370
// bytes for each workload that is listed, twice that where there is much to say, and 6
// bytes for each other one; 200 KiB at most. For 25 workloads at a replica that is 10 KiB,
// or 2 KiB/s for etcd's log, with 60 revisions between its compactions each 5 min; for
// 10,000 that hold, 88 KiB, or 9 KiB/s; and where hundreds are in trouble 20 KiB/s.
// Composing it for 10,000 takes 25 ms of one core.
//
// # Fresh
//
// Whoever reads counts what was written at most [Fresh] ago, by the API server's clock
// on both sides, so that the clock of neither the replica nor the reader matters.
//
// What it does not do: nothing depends on a document but what people are shown. A
// replica that cannot write goes on, and says so in its log.
package report
