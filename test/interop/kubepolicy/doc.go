// Package kubepolicy tests policies, their definition and events against a real
// Kubernetes API server, which is killed, cut off and stripped of permissions.
package kubepolicy
