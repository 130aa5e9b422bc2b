// Package tokenissuer mints tokens in the shape of Kubernetes' bound
// ServiceAccount tokens, for the demo and for tests, where there is no API
// server.
//
// An [Issuer] signs whatever its caller names: it checks nobody, so it must
// never be reachable from a network. Package token verifies what it mints.
package tokenissuer
