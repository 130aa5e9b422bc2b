// Package envoytest runs a real Envoy on loopback that takes its certificates
// from an SDS socket.
//
// [Bootstrap] says which mTLS listeners and mTLS clients the Envoy has and
// which secrets each uses; [Start] runs it; an [Envoy] tells where its
// listeners are and what its statistics say.
//
// It serves no secrets: whatever is under test does that.
package envoytest
