package files

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/meshca/meshca/identity"
)

// Layout says under which names the files lie.
type Layout string

// The layouts. LayoutAuto, or none, takes the one of which there are files.
const (
	LayoutAuto    Layout = "auto"
	LayoutCACerts Layout = "cacerts" // Istio's: ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem
	LayoutTLS     Layout = "tls"     // kubernetes.io/tls: tls.crt (the CA, then its chain), tls.key, ca.crt (the roots)
)

// names of the files of a layout; chain is empty where it follows the CA's certificate.
type names struct{ cert, key, chain, roots string }

var layouts = map[Layout]names{
	LayoutCACerts: {cert: "ca-cert.pem", key: "ca-key.pem", chain: "cert-chain.pem", roots: "root-cert.pem"},
	LayoutTLS:     {cert: "tls.crt", key: "tls.key", roots: "ca.crt"},
}

// Limits on what is read, before any of it is parsed: the largest key that is taken,
// RSA 4096, has 3.3 KB, and its certificate 2 KB.
const (
	maxKeyBytes  = 8 << 10
	maxCertBytes = 64 << 10
	maxRootBytes = identity.MaxCertificatePEM
)

// dataLink is what the kubelet switches when a volume of files changes: each file's
// name leads through it.
const dataLink = "..data"

// contents are the bytes of a set.
type contents struct {
	names                       // full paths, for errors
	certPEM, chainPEM, rootsPEM []byte
	keyPEM                      []byte
	keyMode                     fs.FileMode
	projected                   bool // written by a kubelet
	// sum tells sets apart. It covers all that a judgement depends on but the time.
	sum [sha256.Size]byte
}

// read reads a set. A volume that a kubelet writes is read behind the link that it
// switches, which is followed once: all files are then of one set, whenever the switch
// comes. Elsewhere nothing tells how far a replacement is, and it is for the caller to
// read until two readings are the same.
func read(dir string, layout Layout, readFile fileReader) (*contents, error) {
	base, projected := dir, false
	if target, err := os.Readlink(filepath.Join(dir, dataLink)); err == nil {
		base, projected = filepath.Join(dir, target), true
	}
	n, err := find(dir, base, layout)
	if err != nil {
		return nil, err
	}
	c := &contents{names: n, projected: projected}
	for _, f := range []struct {
		name *string
		most int
		into *[]byte
		mode *fs.FileMode
	}{
		{&c.cert, maxCertBytes, &c.certPEM, nil},
		{&c.key, maxKeyBytes, &c.keyPEM, &c.keyMode},
		{&c.chain, maxCertBytes, &c.chainPEM, nil},
		{&c.roots, maxRootBytes, &c.rootsPEM, nil},
	} {
		if *f.name == "" {
			continue
		}
		shown := filepath.Join(dir, *f.name)
		data, mode, err := readFile(filepath.Join(base, *f.name), f.most)
		if err != nil {
			return nil, unreadable(shown, err)
		}
		if *f.name, *f.into = shown, data; f.mode != nil {
			*f.mode = mode
		}
	}
	c.sum = c.digest()
	return c, nil
}

// fileReader is [inputfile.ReadWithMode], or that and what comes in between in a test.
type fileReader func(path string, most int) ([]byte, fs.FileMode, error)

// find says which layout the files have.
func find(dir, base string, layout Layout) (names, error) {
	if n, ok := layouts[layout]; ok {
		return n, nil
	}
	var found []Layout
	for _, l := range []Layout{LayoutCACerts, LayoutTLS} {
		for _, name := range []string{layouts[l].cert, layouts[l].key} {
			if _, err := os.Stat(filepath.Join(base, name)); err == nil {
				found = append(found, l)
				break
			}
		}
	}
	switch len(found) {
	case 1:
		return layouts[found[0]], nil
	case 0:
		return names{}, &Error{File: dir, Reason: "it holds neither ca-cert.pem and ca-key.pem nor tls.crt and tls.key", Do: "put the CA's files there", Err: fs.ErrNotExist}
	}
	return names{}, &Error{File: dir, Reason: "it holds files of both layouts, ca-cert.pem and tls.crt", Do: "take one away, or say which counts by the setting layout"}
}

func unreadable(path string, err error) error {
	e := &Error{File: path, Err: err}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Reason, e.Do = "it is missing", "put it there: a set is used whole or not at all"
	case errors.Is(err, fs.ErrPermission):
		e.Reason, e.Do = "it may not be read", fmt.Sprintf("it must be readable by the user that runs meshca, uid %d", os.Geteuid())
	default:
		// The path is named already.
		if p := new(fs.PathError); errors.As(err, &p) {
			err = p.Err
		}
		e.Reason = err.Error()
	}
	return e
}

func (c *contents) digest() [sha256.Size]byte {
	h := sha256.New()
	for _, part := range [][]byte{
		[]byte(c.cert), c.certPEM, []byte(c.key), c.keyPEM, []byte(c.chain), c.chainPEM, []byte(c.roots), c.rootsPEM,
		fmt.Append(nil, c.keyMode, c.projected),
	} {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
		h.Write(part)
	}
	return [sha256.Size]byte(h.Sum(nil))
}
