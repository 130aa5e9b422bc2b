// Package wycheproof drives the verification of tokens with Project Wycheproof's
// vectors: whole signed objects of JOSE, and signatures of the kinds that a token
// can have. Each disagreement with Wycheproof's verdict is listed in the tests
// with its reason, and those that do not occur any more make them fail.
package wycheproof
