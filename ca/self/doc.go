// Package self is the upstream authority that needs nothing else: a root of our
// own in a state directory.
//
// [Init] makes the root, once. [Open] reads it and returns an [Upstream] that
// signs intermediates. Between them stands one rule: a root is whole or it is
// not there, and one that was there is never replaced. A state that is
// damaged, or whose key is gone, is refused with the file and the reason, and
// has to be restored from a backup; a new root would cut every workload off
// from every other.
//
// The package keeps nothing but the root: no serial numbers (they are random),
// no intermediates, no bundle of other roots.
//
// # State directory
//
// The directory belongs to the user that runs the CA and is closed to others.
//
//	initialized          marker: the key identifier of the root that was made here
//	root.pem             the root's certificate, for agents to trust; a copy
//	authority/root.key   the root's key, PKCS#8 in PEM, 0600
//	authority/root.pem   the root's certificate
//	authority/state.json version, trust domain, checksums of both
//
// Init builds the folder authority under another name, syncs all of it, and
// renames it: that is the instant at which the root exists. The marker and the
// copy follow; Open makes them if a crash came first. The marker stands apart
// from the root so that its loss shows.
package self
