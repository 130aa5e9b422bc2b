package bundle

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/meshca/meshca/identity/inputfile"
)

// rereadAfter is how often the files are looked at, at most: at a handshake.
const rereadAfter = 10 * time.Second

// maxFile bounds what is read as a certificate or a key.
const maxFile = 256 << 10

// pair is a certificate and its key in two files that others replace. They are
// compared by content: a projected Secret changes by a link, and a clock that was
// set back makes times lie.
type pair struct {
	certFile, keyFile string
	now               func() time.Time
	log               *slog.Logger

	mu        sync.Mutex // guards what follows
	readAt    time.Time
	certPEM   []byte
	keyPEM    []byte
	current   *tls.Certificate
	complaint string // the last one that was logged
}

// certificate returns the newest pair that fits together. While the files do not,
// as in the middle of a replacement, it is the one before.
func (p *pair) certificate() (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if age := now.Sub(p.readAt); p.current != nil && age >= 0 && age < rereadAfter {
		return p.current, nil
	}
	p.readAt = now
	if err := p.readLocked(); err != nil {
		if p.current == nil {
			return nil, err
		}
		if err.Error() != p.complaint {
			p.complaint = err.Error()
			p.log.Error("bundle endpoint: the certificate is served that was read before", "error", err)
		}
		return p.current, nil
	}
	p.complaint = ""
	return p.current, nil
}

func (p *pair) readLocked() error {
	certPEM, err := inputfile.Read(p.certFile, maxFile)
	if err != nil {
		return fmt.Errorf("reading the bundle endpoint's certificate: %w", err)
	}
	keyPEM, err := inputfile.Read(p.keyFile, maxFile)
	if err != nil {
		return fmt.Errorf("reading the bundle endpoint's key: %w", err)
	}
	if p.current != nil && bytes.Equal(certPEM, p.certPEM) && bytes.Equal(keyPEM, p.keyPEM) {
		return nil
	}
	c, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return fmt.Errorf("the bundle endpoint's certificate %q and key %q do not fit together: %w", p.certFile, p.keyFile, err)
	}
	if p.current != nil {
		p.log.Info("bundle endpoint: another certificate is served from now on", "file", p.certFile, "ends", c.Leaf.NotAfter)
	}
	p.certPEM, p.keyPEM, p.current = certPEM, keyPEM, &c
	return nil
}
