// Package conformance writes docs/conformance.md: which requirement is answered
// by which test, and which control that test misses when it is switched off.
//
// Requirements are in ids.yaml, tests say in their names which they answer, and
// the lists in test/mutants say what was switched off. A requirement counts
// only when it has both.
package conformance
