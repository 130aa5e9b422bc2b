// Package kubereport holds what the CA's replicas report, and what meshca status and
// meshca explain make of it, against a real API server.
package kubereport
