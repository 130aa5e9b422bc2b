// Package sds hands out one workload's identity on a Unix socket: its
// X509-SVID with the private key, and the trust bundles that it believes.
//
// [Server] speaks three protocols over the same [State]: Envoy's secret
// discovery service v3 (state of the world, delta and fetch), the X.509 profile
// of the SPIFFE Workload API, and delta ADS with the one resource that tells
// meshca's own proxy the policy. gRPC health and reflection stand beside them. Whoever can connect gets the identity: the socket is the boundary, and
// [Listen] makes it. The server authenticates nobody.
//
// What it serves comes through a [Feed], to which the agent publishes whole,
// immutable states. Each state is encoded once and shared by all streams, and
// versions count per kind of content, so that a new bundle does not push the
// certificate again.
//
// The package obtains nothing, verifies nothing and decides nothing: renewal,
// the check that a bundle is not older than the one before, and policy are the
// publisher's.
package sds
