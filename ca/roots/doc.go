// Package roots keeps which roots the consumers of a trust bundle were told of. It is
// for an upstream authority that counts no versions itself: an operator's files, or
// another program such as Vault.
//
// A [Keeper] holds the bundle between an upstream and an authority, in a record that
// outlives the process and that all replicas share (a [Store]). It has three rules,
// from which it follows that nobody is cut off when an operator replaces a root:
//
//   - A root that the upstream shows is added at once, but no chain may end in it
//     before it has been in the bundle for long enough to have reached everybody.
//   - A root that the upstream shows no more stays for as long as a certificate under
//     it can be alive. An upstream that left it out earlier is refused.
//   - The sequence rises with each change, and at least to the clock's second. A record
//     that was lost, or restored from an old backup, so never leads back to a sequence
//     that consumers have seen with other roots.
//
// Whoever can write the record can add a root to the bundle: it lies where the
// authority's own state does, and is to be guarded like that.
//
// The package does not sign, and does not ask the upstream for anything.
package roots
