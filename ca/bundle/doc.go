// Package bundle is the server's side of SPIFFE federation: a bundle endpoint with
// the profile https_web, at which other trust domains fetch ours.
//
// [Server] answers GET with the newest bundle as a JWK Set, over TLS with a
// certificate that the operator provides and that clients verify by name, as a web
// server's. It asks for no credentials: a bundle is public. It fetches nothing and
// redirects nobody; bundles of other domains are not its concern.
package bundle
