// Package policydir keeps the policies of a directory of YAML files in force
// while people and machines change the files.
//
// A [Source] watches the directory and, because watches lose things, reads all of
// it again and again; what it makes of it is published as immutable [Snapshot]s.
// It errs towards what was in force before: a file that cannot be read, is refused
// or is empty keeps its last good policies, a directory that is gone keeps all, and
// where something has never been good, everybody gets STRICT. What a policy means is
// decided by package policy, what is wrong with one by policy/manifest.
package policydir
