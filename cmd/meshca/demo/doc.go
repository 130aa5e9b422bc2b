// Package demo runs the whole path in one process, on loopback, with nothing
// faked but the API server: an issuer of Kubernetes-shaped tokens, the CA, two
// agents with their sockets, a proxy, and small programs that talk mutual TLS
// through go-spiffe, or plaintext. [Run] shows each step and whether it held.
//
// A step is judged at the other end of a socket: by what a peer saw in a
// handshake or by the code that came over the wire, never by our own state.
package demo
