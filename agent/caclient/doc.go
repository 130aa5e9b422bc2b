// Package caclient speaks to the CA: it asks for certificates over Istio's CSR
// API and follows the caller's meshca.v1.Workload resource over delta xDS
// (docs/design.md, section "Wire").
//
// [Client] holds one connection at a time and knows several addresses. A round
// begins at the address that answered last and goes on to the next at once when
// one fails; each attempt has its own deadline. The trust anchor file is read
// again for each connection, and the token for each attempt, so that a repaired
// file is enough to repair the client.
//
// A token never leaves the process before the server's certificate has been
// verified: a connection exists only after its TLS handshake, and tokens travel
// only with calls on a connection.
//
// The package keeps no identity, decides nothing about renewal and never waits
// between rounds: that is package agent's. It logs nothing; its errors carry
// what there is to say, and never a token.
package caclient
