// Package pods knows which pods of the cluster live, by UID. A [Pods] follows pods,
// nodes, ServiceAccounts and namespaces at the API server, keeps a few facts of
// each, and says whether what a token was made for still exists ([Pods.Check]).
//
// A pod lives if it exists, has not finished and is not overdue: one that drains
// lives until a minute after its deletionTimestamp, which has its grace in it.
// It counts only with the ServiceAccount, and on the node, that the token names,
// as its own spec has them, and as long as that ServiceAccount and node are the
// ones with the UIDs in the token. In a namespace that is being terminated only
// pods that drain renew. What was issued before runs out; the CA keeps no list of
// it.
//
// What the watch has not reported costs one lookup at the API server, since it may
// be newer: nobody is refused for a watch that lags. What was found that way
// counts until the watch has come as far. A UID that is known to be gone costs no
// further lookup.
//
// Without the API server what is known stays known, for as long as that takes. What
// is not known cannot be told then, and once nothing has been heard for five
// minutes it is not asked for either.
//
// It uses these permissions, all of them in the core API group and of the whole
// cluster, and no others:
//
//	resource         verbs             for
//	pods             list, watch, get  who lives where, under which ServiceAccount; get: newer than the watch
//	nodes            list, watch, get  UIDs; metadata only
//	serviceaccounts  list, watch, get  UIDs; metadata only
//	namespaces       list, watch, get  what is being terminated; metadata only
//
// What it does not do: it verifies no token and issues nothing, and it never
// writes to the API server.
package pods
