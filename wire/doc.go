// Package wire is what meshca adds to xDS: [Workload], the one resource of its
// own, as a noun, and [Delta], one delta stream of one such resource.
//
// The CA sends the resource to agents, and agents send it to the proxies beside
// them; all of them read and write it here. The generated message is package
// meshcav1's, and nobody else touches it. The package opens no connections and
// decides nothing: whether a bundle or a policy may take the place of the one
// before is the receiver's to say.
//
// The contract is in docs/design.md, section "Wire".
package wire
