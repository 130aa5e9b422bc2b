// Package ca is the authority: it holds an intermediate CA in memory, signs
// X509-SVIDs and the CA's own serving certificates with it, and replaces it in
// good time.
//
// The main type is [Authority]. It owns what a certificate looks like (one
// fixed profile, to which a caller brings a public key and nothing else), how
// long it lives, and that every signature is in the audit trail twice: before
// it is made and before what it made leaves.
//
// It does not decide who is asking: [Authority.Issue] takes a
// [caller.Caller], which only package caller can make. It does not keep a
// root: an [Upstream], such as package self, signs the intermediate. It does
// not speak any protocol.
package ca
