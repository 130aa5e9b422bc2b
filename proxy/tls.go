package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/meshca/meshca/identity"
)

// istioProtocol is the ALPN name that our outbound side offers, alone. Istio's
// sidecars take it for mutual TLS around plain TCP. A client that offered
// istio-peer-exchange besides would be sent Istio's metadata frame before the
// app's first byte.
const istioProtocol = "istio"

// offersMesh reports whether a client asks for mutual TLS of the mesh: by the
// names that Istio's clients offer, all of which begin alike.
func offersMesh(alpn []string) bool {
	return slices.ContainsFunc(alpn, func(name string) bool { return strings.HasPrefix(name, istioProtocol) })
}

// appProtocols are the ALPN names that the inbound side may select: those that
// mean something to the app behind it. An istio name is never selected; see
// [istioProtocol].
func appProtocols() []string { return []string{"h2", "http/1.1"} }

// oldTLSError says that a client does not speak TLS 1.3.
type oldTLSError struct{ offered []uint16 }

func (e *oldTLSError) Error() string {
	newest := uint16(0)
	for _, v := range e.offered {
		newest = max(newest, v)
	}
	return fmt.Sprintf("the client speaks %s at most, and TLS 1.3 is needed; an Envoy as client wants tls_maximum_protocol_version: TLSv1_3 in its tls_params",
		tls.VersionName(newest))
}

// serverTLS returns the inbound side's configuration: identity's, with the
// application protocol chosen for each ClientHello.
//
// crypto/tls ends a handshake in which both sides name protocols and share
// none. Istio's listeners take any list, so only a protocol that this client
// offered is ever named to it. The client's order decides, since it is the
// client's protocol that the app will get to see.
func serverTLS(id Identity, c Config) (*tls.Config, error) {
	base, err := identity.ServerTLS(identity.TLSConfig{
		SVIDs: id, Bundles: id, Now: c.Now,
		// Who may talk to whom is the app's affair. A member of another trust
		// domain gets here only if that domain's bundle was given to us.
		Authorize: identity.AuthorizeAny(),
	})
	if err != nil {
		return nil, err
	}
	naming := make(map[string]*tls.Config)
	for _, name := range appProtocols() {
		naming[name] = base.Clone()
		naming[name].NextProtos = []string{name}
	}
	server := base.Clone()
	server.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if !slices.Contains(hello.SupportedVersions, tls.VersionTLS13) {
			// An error from here would tell the client that we are broken. What
			// crypto/tls does next is right: protocol_version.
			if from, ok := hello.Conn.(*below); ok {
				from.oldTLS = &oldTLSError{slices.Clone(hello.SupportedVersions)}
			}
			return nil, nil
		}
		for _, name := range hello.SupportedProtos {
			if conf := naming[name]; conf != nil {
				return conf, nil
			}
		}
		return nil, nil
	}
	return server, nil
}

// clientTLS returns the configuration towards exactly one peer.
func clientTLS(id Identity, peer identity.ID, c Config) (*tls.Config, error) {
	return identity.ClientTLS(identity.TLSConfig{
		SVIDs: id, Bundles: id, Now: c.Now,
		Authorize:  identity.AuthorizeIDs(peer),
		NextProtos: []string{istioProtocol},
	})
}

// failure is why a handshake did not come about: a value of the label reason.
type failure string

const (
	failedTimeout       failure = "timeout"
	failedClosed        failure = "closed by peer"
	failedTooLarge      failure = "hello too large"
	failedMalformed     failure = "hello malformed"
	failedOldTLS        failure = "old tls"
	failedNoCertificate failure = "no certificate"
	failedNotVerified   failure = "peer not verified"
	failedNoSVID        failure = "no svid"
	failedAlert         failure = "refused by peer"
	failedProtocol      failure = "protocol error"
)

func failures() []failure {
	return []failure{
		failedTimeout, failedClosed, failedTooLarge, failedMalformed, failedOldTLS,
		failedNoCertificate, failedNotVerified, failedNoSVID, failedAlert, failedProtocol,
	}
}

// classify tells from a handshake's error, and from how far it came, why it
// failed.
func classify(err error, state tls.ConnectionState, id identity.SVIDSource) failure {
	var (
		verify *identity.VerifyError
		old    *oldTLSError
		op     *net.OpError
	)
	switch {
	case errors.As(err, &verify):
		return failedNotVerified
	case errors.As(err, &old):
		return failedOldTLS
	case errors.Is(err, errHelloTooLarge):
		return failedTooLarge
	case errors.Is(err, errHelloBroken):
		return failedMalformed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return failedTimeout
	case errors.As(err, &op) && op.Op == "remote error": // how crypto/tls marks a peer's alert
		return failedAlert
	case isGone(err):
		return failedClosed
	}
	if svid, err := id.SVID(); err != nil || svid == nil {
		return failedNoSVID
	}
	// crypto/tls has no type for a missing certificate. A handshake that agreed
	// on a group for its keys (the last thing that a hello can be refused for),
	// and then failed here before there were certificates to look at, failed for
	// the lack of them.
	if state.CurveID != 0 && len(state.PeerCertificates) == 0 {
		return failedNoCertificate
	}
	return failedProtocol
}

// isGone reports whether err means that the other end went away.
func isGone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED)
}
