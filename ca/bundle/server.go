package bundle

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/netutil"
)

// Limits of the listener, which anybody may reach.
const (
	maxConnections = 256
	maxHeader      = 8 << 10
	headerTimeout  = 5 * time.Second
	requestTimeout = 10 * time.Second
	idleTimeout    = 15 * time.Second // clients come every few minutes
	drainTimeout   = 5 * time.Second
)

// suites are those of TLS 1.2 in Mozilla's intermediate profile
// (SPIFFE_Federation §5.1); Go's default has some with CBC beside them.
var suites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// Config is what a [Server] is made from.
type Config struct {
	Source   Source           // required
	CertFile string           // required: the operator's certificate with its chain, PEM
	KeyFile  string           // required
	Refresh  time.Duration    // zero means [DefaultRefreshHint]
	Now      func() time.Time // nil means time.Now
	Log      *slog.Logger     // nil means no log
}

// Server is a bundle endpoint.
type Server struct {
	http *http.Server
	pair *pair
}

// New reads the certificate, so that a start with a wrong one fails.
func New(c Config) (*Server, error) {
	if c.Source == nil || c.CertFile == "" || c.KeyFile == "" {
		return nil, errors.New("bundle endpoint: Source, CertFile and KeyFile must all be given")
	}
	if c.Refresh == 0 {
		c.Refresh = DefaultRefreshHint
	}
	if c.Refresh < time.Second {
		return nil, fmt.Errorf("bundle endpoint: the refresh hint %v is below a second, which it cannot say", c.Refresh)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{pair: &pair{certFile: c.CertFile, keyFile: c.KeyFile, now: c.Now, log: c.Log}}
	if _, err := s.pair.certificate(); err != nil {
		return nil, err
	}
	s.http = &http.Server{
		Handler: Handler(c.Source, c.Refresh),
		TLSConfig: &tls.Config{
			MinVersion:     tls.VersionTLS12,
			CipherSuites:   suites,
			ClientAuth:     tls.NoClientCert,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.pair.certificate() },
		},
		ReadHeaderTimeout: headerTimeout, ReadTimeout: requestTimeout, WriteTimeout: requestTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(c.Log.Handler(), slog.LevelDebug), // handshakes that strangers break
	}
	return s, nil
}

// Serve answers on l, which it closes, until ctx is done; it returns nil then.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		err := s.http.Shutdown(ctx)
		if err != nil {
			err = s.http.Close()
		}
		stopped <- err
	})
	err := s.http.ServeTLS(netutil.LimitListener(newFair(l), maxConnections), "", "")
	if stop() {
		return fmt.Errorf("bundle endpoint on %s: %w", l.Addr(), err)
	}
	return <-stopped
}
