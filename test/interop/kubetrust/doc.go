// Package kubetrust tests against a real API server that the trust bundle reaches
// whoever needs it, never goes back, and never takes anything from others.
package kubetrust
