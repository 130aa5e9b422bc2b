// Package identity holds the nouns of a SPIFFE mesh: trust domains, SPIFFE
// IDs, X509-SVIDs, trust bundles, and the two TLS configurations that are
// built from them.
//
// Every value here is valid by construction: the fields are private, the
// constructors check what the SPIFFE standards demand, and so a function that
// takes an [ID], an [SVID] or a [Bundle] need not check again. The vocabulary
// is that of github.com/spiffe/go-spiffe/v2, on which the parsing rests; the
// types are our own because the standards ask for more than that library
// checks (lengths, root paths, extended key usages by role, bundle entries
// that must be skipped instead of failing the document).
//
// [Verify] is the one place where a peer's certificates turn into an ID.
//
// The package does no I/O, starts no goroutine and keeps no clock: whoever
// verifies says what time it is. It issues nothing; that is package ca's.
package identity
