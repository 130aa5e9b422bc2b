// Package meshcav1 is generated from workload.proto (by `make generate`), the
// one xDS resource that is meshca's own. Only ca/server and agent/caclient
// touch it; everything behind them works with package identity's types.
package meshcav1

// TypeURL is the type under which [Workload] is subscribed to over ADS.
const TypeURL = "type.googleapis.com/meshca.v1.Workload"
