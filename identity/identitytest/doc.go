// Package identitytest is a small certificate authority for tests. A [CA] makes
// real certificates of the shape that meshca's own authority makes (root,
// intermediate of path length 0, leaf with one URI and an empty subject), and
// on demand leaves that break any rule: every template can be changed before it
// is signed.
//
// It is a stand-in for package ca in the tests of everything that consumes
// SVIDs and bundles. It checks nothing and keeps nothing; no program may link
// it.
package identitytest
