// Package meshcav1 is generated from workload.proto (by `make generate`), the
// one xDS resource that is meshca's own. Package wire alone touches it, besides
// tests; everybody else works with the nouns that it makes of the message.
package meshcav1
