// Package vault has intermediates signed by the PKI secrets engine of a HashiCorp
// Vault. [Upstream] is the way to one issuer of one mount, and a [ca.Upstream].
//
// What it promises:
//
//   - Every parameter that decides what is signed is in the request, so that a policy
//     in Vault can allow exactly this and nothing else; see docs/vault.md.
//   - Of the answer only what a chain of signatures connects to one of the operator's
//     own roots is believed, whatever its order. Nothing that Vault says adds a root.
//     The issuer is named and fixed: when the mount gets another default, that is
//     reported, and not used.
//   - One goroutine at a time speaks to Vault: [Upstream.Run], which logs in, renews
//     the token, logs in again before it ends and looks how Vault is, or
//     [Upstream.SignIntermediate]. What went wrong is one of a closed set of states.
//     While Vault is away it is looked for every 5 s, which needs no token; once it is
//     back and an intermediate was wanted meanwhile, [Upstream.Changed] says so.
//   - A token that is refused is looked up. If it is not known any more there is one
//     new login, and further ones only after growing pauses; if it is, the policy is to
//     blame and there is none.
//   - Tokens and SecretIDs are in memory only, and neither in logs nor in errors. They
//     go to the configured servers: redirects are not followed, and no proxy of the
//     environment is asked. An answer has at most 1 MiB and a deadline.
//
// The token is revoked when Run ends, unless it came from a file.
package vault
