// Package jwks keeps an issuer's public keys: a [Cache] reads a JWK Set (RFC
// 7517) from a [File] or over [HTTPS] and answers package token's questions for
// a key.
//
// What it promises:
//
//   - The set is read again at intervals by [Cache.Run], and when a token names a
//     key that is not in it, at most once in 10 s however many callers ask.
//     That there is no such key is only said from a set that was loaded after
//     the question; until there can be one, the answer is an error.
//   - While it is being loaded, 64 callers wait for it; more are answered with an
//     error at once. Questions for a key that is there never wait.
//   - A set that cannot be had or read changes nothing: the last good one goes on
//     being used, without end. Before there was a good one, every question is
//     answered with an error; there is no built-in key.
//   - A key that has gone from the set is still given out for 60 s, so that
//     tokens under way at a rotation are not refused.
//   - Over HTTPS the server is verified against the operator's own CA file and
//     nothing else, redirects are not followed, and no proxy of the environment is
//     asked.
//
// Keys that no API server signs with are left out of a set with a line in the
// log: symmetric ones, ones for encryption, RSA under 2048 bits, ones without
// an ID, and ones whose private half was published with them. Several keys
// under one ID are all kept, and a signature by any of them is good: they are
// told apart by nothing else, and one publisher vouches for all of them.
package jwks
