// Package mutant reads the lists of switched-off controls in test/mutants and
// says whether they still fit the code.
//
// A [Mutant] names a control, an edit that switches it off, and the tests that
// must notice. Running them is the command's business (test/mutants); what they
// prove is listed by test/conformance.
package mutant
