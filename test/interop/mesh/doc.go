// Package mesh tests the two programs, meshca and agent, from outside: both
// are built and run as processes, and every verdict is taken at the other end
// of a socket, by Envoy, go-spiffe, openssl or a plain gRPC client. What only a
// process can suffer is done to them for real: they are killed, stopped and
// restarted under load.
//
// It has no code that others use.
package mesh
