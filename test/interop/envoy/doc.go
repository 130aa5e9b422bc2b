// Package envoy tests against a real Envoy that takes its certificates over
// SDS.
package envoy
