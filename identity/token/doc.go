// Package token verifies Kubernetes-shaped ServiceAccount tokens without
// asking anybody: signature, issuer, audience, times, lifetime, and the binding
// to a ServiceAccount, a pod and a node.
//
// A [Verifier] turns a raw token into [Claims]; Claims come from nowhere else,
// so whoever holds some holds verified ones. The issuer's public keys come from
// a [KeySource] (package jwks has them) and from no other place: when they
// cannot be had, every token is refused with an [UnavailableError], and no
// built-in key steps in.
//
// Where the standards leave a choice the strict side is taken, because every
// token that an API server mints passes and nobody else has to be served:
//
//   - The header holds "alg", "kid" and, if anything more, "typ": "JWT". Any
//     other member is refused, foremost those that bring keys along (jwk, jku,
//     x5u, x5c) or change what is signed (crit, b64, zip).
//   - The algorithm is one that the key allows; the header only says which.
//   - A signature has the one form of RFC 7518 §3: PS256 with a salt of 32 bytes,
//     ECDSA as two numbers of the curve's size.
//   - "iss", "sub", "aud", "exp", "nbf" and "iat" must all be there. Times are
//     whole seconds: fractions and exponents, which RFC 7519 §2 would permit, are
//     refused.
//   - A member that occurs twice, in the header or in the claims that are read,
//     makes the token invalid (RFC 7519 §4 leaves it to us).
//
// An issuer may be asked itself instead (a [Reviewer]): then its answer takes the
// place of the signature, and everything else is judged as always.
//
// What the package does not do: it cannot know that a pod has been deleted since
// its token was minted. Asking the cluster is the caller's business.
package token
