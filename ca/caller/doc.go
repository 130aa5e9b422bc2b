// Package caller says who is asking the CA. An [Authenticator] turns
// credentials, a ServiceAccount token or a current SVID, into a [Caller], and
// nothing else can: package ca signs only for a Caller, so a path to the
// signing key that forgets to authenticate does not compile.
//
// It decides identity and not permission: what a caller may have is decided
// where it asks. Whether the token's pod still lives is asked of a [Liveness]
// where the issuer's [Cluster] has one, after the token was verified; package
// kube/pods is one.
package caller
