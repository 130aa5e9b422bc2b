// Package findings says what each code of a finding means and what to do about it. It
// is the text of docs/findings.md and of "meshca explain CODE".
package findings
