// Package vault holds package ca/vault against a real Vault server: its PKI, its
// policies, Kubernetes auth with a real API server, AppRole, and all that goes wrong.
//
// It has no code that others use.
package vault
