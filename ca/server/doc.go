// Package server is the CA's face on the wire: Istio's CSR API, delta xDS for
// agents and gRPC health, on one TLS port. docs/design.md, "Wire", is its
// contract.
//
// The main type is [Server]. It reads credentials off a call, has package caller
// say who that is, package csr judge what is asked for and package ca sign, and
// turns what went wrong into a code, a constant text with a reference, and one
// log line with that reference and the reason. It renews its own serving
// certificate.
//
// It decides nothing about identity, keys or lifetimes, and no interceptor of
// it authorizes: every handler authenticates its own caller first, so that no
// way of reaching a handler can go around that (CVE-2026-33186).
package server
