// Package catest gives tests a real authority: a root in a temporary state
// directory, an audit trail in a file, an issuer of tokens and the
// authenticator that believes it. Nothing in it is a fake.
//
// The main type is [Kit]. It does not serve: the servers have their own tests,
// which build them on a Kit.
package catest
