// Package vaulttest runs a real Vault for tests: servers of their own, with TLS, that
// can be sealed, killed and started anew.
//
// It is for tests only.
package vaulttest
