package identity_test

import (
	"crypto/tls"
	"errors"
	"testing"
	"time"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

// certificateOf is what crypto/tls shows for a peer.
func certificateOf(p identitytest.Peer) *tls.Certificate {
	c := &tls.Certificate{PrivateKey: p.Key}
	for _, one := range p.Chain {
		c.Certificate = append(c.Certificate, one.Raw)
	}
	return c
}

// Every peer of the set gets the same verdict from Verify, from our server and
// from our client.
func TestV24_V64_PeersAreJudgedAlike(t *testing.T) {
	peers := identitytest.NewPeers(t, identitytest.ID(t, cart))
	ours := newSide(t, peers.SVID(t, identitytest.ID(t, pay)), peers.Own.Bundle(), func() time.Time { return peers.Now })
	ours.conf.Bundles = peers
	server, client := ours.server(t), ours.client(t)
	for _, p := range peers.All {
		t.Run(p.Name, func(t *testing.T) {
			for role, want := range map[identity.Role]bool{identity.Client: p.AsClient, identity.Server: p.AsServer} {
				got, err := identity.Verify(p.Chain, role, peers, peers.Now)
				var verr *identity.VerifyError
				if want && (err != nil || got != p.Claims) || !want && (!errors.As(err, &verr) || !got.IsZero()) {
					t.Errorf("Verify as %v: %v, %v", role, got, err)
				}
			}
			_, state, _, err := handshake(t, server, &tls.Config{
				InsecureSkipVerify: true, Certificates: []tls.Certificate{*certificateOf(p)}, //nolint:gosec // the server judges
			})
			judgeHandshake(t, "the server", p, p.AsClient, state, err)
			state, _, err, _ = handshake(t, &tls.Config{Certificates: []tls.Certificate{*certificateOf(p)}, ClientAuth: tls.RequireAnyClientCert}, client)
			judgeHandshake(t, "the client", p, p.AsServer, state, err)
		})
	}
}

// To verify for both roles at once is to verify for one after the other.
func TestVerifyBothIsVerifyTwice(t *testing.T) {
	peers := identitytest.NewPeers(t, identitytest.ID(t, cart))
	for _, p := range peers.All {
		want, wantErr := identity.Verify(p.Chain, identity.Server, peers, peers.Now)
		if wantErr == nil {
			want, wantErr = identity.Verify(p.Chain, identity.Client, peers, peers.Now)
		}
		got, err := identity.VerifyBoth(p.Chain, peers, peers.Now)
		if got != want || (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
			t.Errorf("%s: %v, %v; one after the other: %v, %v", p.Name, got, err, want, wantErr)
		}
	}
}

func judgeHandshake(t *testing.T, who string, p identitytest.Peer, want bool, state tls.ConnectionState, err error) {
	t.Helper()
	if !want {
		if err == nil {
			t.Errorf("%s believes it", who)
		}
		return
	}
	if id, idErr := identity.PeerID(state); err != nil || idErr != nil || id != p.Claims {
		t.Errorf("%s: %v, %v, %v", who, id, err, idErr)
	}
}
