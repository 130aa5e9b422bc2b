package caclienttest

import (
	"crypto"
	"errors"
	"io"
)

// publicOnly is a key of which only the public half is known: identitytest
// signs for it, and nobody with it.
type publicOnly struct{ pub crypto.PublicKey }

func (k publicOnly) Public() crypto.PublicKey { return k.pub }

func (publicOnly) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("only the public key is here")
}
