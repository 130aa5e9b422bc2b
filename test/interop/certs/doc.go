// Package certs shows every kind of certificate that meshca makes to TLS
// libraries that we did not write, in both roles of a handshake and by their own
// tools for verifying a path. What each of them refuses stands in
// docs/interop.md, which the tests here write and check.
//
// It judges certificates and handshakes only; Envoy has a package of its own.
package certs
