// Package proxy is the data path of the small mTLS proxy that stands beside a
// workload: it lets mutual TLS in as PeerAuthentication wants it, and carries
// the workload's own connections out over mutual TLS to exactly the peer that
// was named.
//
// A [Proxy] serves the [Inbound] and [Outbound] listeners of its [Config]. Who
// it is and whom it believes comes from an [Identity], how strict a port is
// from a [Policy]; both are asked for each connection and may change at any
// time. It listens only once it has both, and it never sends in plaintext what
// was to be encrypted.
//
// It carries TCP and looks at nothing above TLS. It decides nothing about who
// may talk to whom beyond trust domains and the ID that an outbound listener
// names, and it finds no destinations by itself.
package proxy
