package ca

import (
	"crypto"
	"io"
)

// What the tests of package ca_test reach into. They stand outside because they
// use the real upstream, which imports this package.

// SetNewKey changes how keys of intermediates are made.
func (a *Authority) SetNewKey(f func() (crypto.Signer, error)) { a.newKey = f }

// SetRandom changes where serial numbers come from.
func (a *Authority) SetRandom(r io.Reader) { a.random = r }
