// Package csr judges certificate signing requests. [Parse] takes the PEM text
// that a caller sent and yields one thing, the public key; every other wish
// that a CSR can carry is a reason to refuse it. So no name, extension or
// attribute of a CSR can reach a certificate: nothing that could hold one
// leaves this package.
//
// What is judged is the raw encoding, cheapest test first: sizes, then the
// structure and the key's type and size, then subject and attributes, and only
// for what is left the signature by which the caller proves to hold the key.
// Verifying one RSA-16384 signature costs as much as issuing twenty
// certificates, so no key gets that far that the CA would not certify.
//
// The package does not know who may ask for what: the caller's ID is an
// argument, proved elsewhere (package caller).
package csr
