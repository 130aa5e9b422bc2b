package relays

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/token/tokenissuer"
	"github.com/meshca/meshca/test/bench/rig"
)

const (
	trustDomain = "example.org"
	issuerURL   = "https://tokens.test"
	clientName  = "frontend"
	serverName  = "cart"
)

// mesh is a CA and an agent. They feed our proxy; the other relays have the same
// identity's certificate, of the same CA, in files.
type mesh struct {
	run    *rig.Run
	issuer *tokenissuer.Issuer
	domain identity.TrustDomain
	ca     string // its address

	socket           string // the agent's
	root, chain, key string // the files
	client           *tls.Config
	stops            []func() error
}

func startMesh(ctx context.Context, r *rig.Run) (*mesh, error) {
	m := &mesh{run: r, socket: filepath.Join(r.Dir, "agent.sock"), root: filepath.Join(r.Dir, "state", "root.pem")}
	if err := m.begin(ctx); err != nil {
		return nil, errors.Join(err, m.stop())
	}
	return m, nil
}

func (m *mesh) begin(ctx context.Context) (err error) {
	if m.domain, err = identity.ParseTrustDomain(trustDomain); err != nil {
		return err
	}
	if m.issuer, err = tokenissuer.New(tokenissuer.Config{URL: issuerURL}); err != nil {
		return err
	}
	if err := m.startCA(ctx); err != nil {
		return err
	}
	server, bundle, err := m.obtain(ctx, serverName)
	if err != nil {
		return err
	}
	client, _, err := m.obtain(ctx, clientName)
	if err != nil {
		return err
	}
	if err := m.write(server); err != nil {
		return err
	}
	m.client, err = identity.ClientTLS(identity.TLSConfig{
		SVIDs: client, Bundles: bundle, Authorize: identity.AuthorizeIDs(server.ID()), Now: time.Now,
		NextProtos: []string{"istio"}, // an Istio sidecar's; only our proxy looks at it
	})
	if err != nil {
		return err
	}
	m.client.CurvePreferences = []tls.CurveID{tls.X25519} // which our proxy cannot be told itself
	return m.startAgent(ctx)
}

func (m *mesh) startCA(ctx context.Context) error {
	program, err := m.run.Program(ctx, "./cmd/meshca")
	if err != nil {
		return err
	}
	state := filepath.Dir(m.root)
	if out, err := exec.CommandContext(ctx, program, "init", "--state-dir", state, "--trust-domain", trustDomain).CombinedOutput(); err != nil {
		return fmt.Errorf("making a root: %w\n%s", err, out)
	}
	keys, err := m.run.Write("jwks.json", m.issuer.JWKS())
	if err != nil {
		return err
	}
	config, err := m.run.Write("meshca.yaml", fmt.Appendf(nil, "trust_domain: %s\ntoken_issuers: [{issuer: %q, jwks_file: %q}]\n", trustDomain, issuerURL, keys))
	if err != nil {
		return err
	}
	if m.ca, err = freeAddress("127.0.0.1"); err != nil {
		return err
	}
	return m.start("meshca", program, "serve", "--state-dir", state, "--config", config, "--listen", m.ca, "--ops-listen", "",
		"--audit-log", filepath.Join(m.run.Dir, "audit.jsonl"))
}

func (m *mesh) startAgent(ctx context.Context) error {
	program, err := m.run.Program(ctx, "./cmd/agent")
	if err != nil {
		return err
	}
	config, err := m.run.Write("agent.yaml", []byte("trust_domain: "+trustDomain+"\n"))
	if err != nil {
		return err
	}
	return m.start("agent", program, "--config", config, "--ca", m.ca, "--trust-anchor", m.root,
		"--token-file", m.tokenFile(serverName), "--socket", m.socket)
}

func (m *mesh) start(name, program string, args ...string) error {
	_, stop, err := m.run.Start(name, program, args...)
	if err == nil {
		m.stops = append(m.stops, stop)
	}
	return err
}

func (m *mesh) stop() error {
	var errs []error
	for i := len(m.stops) - 1; i >= 0; i-- {
		errs = append(errs, m.stops[i]())
	}
	return errors.Join(errs...)
}

func (m *mesh) tokenFile(account string) string { return filepath.Join(m.run.Dir, account+".token") }

// obtain gets a ServiceAccount a token, and a certificate from the CA as soon as
// that answers.
func (m *mesh) obtain(ctx context.Context, account string) (*identity.SVID, *identity.Bundle, error) {
	token, err := m.issuer.Issue(tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: account, PodName: account + "-0", PodUID: "uid-of-" + account,
		NodeName: "node", NodeUID: "uid-of-node", Audience: []string{"meshca"}, Lifetime: time.Hour,
	})
	if err != nil {
		return nil, nil, err
	}
	if err := os.WriteFile(m.tokenFile(account), []byte(token), 0o600); err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, err
	}
	client, err := caclient.New(caclient.Config{Addresses: []string{m.ca}, TrustDomain: m.domain, AnchorFile: m.root, Now: time.Now})
	if err != nil {
		return nil, nil, err
	}
	defer client.Close()
	var signed *caclient.Signed
	if err := rig.Poll(ctx, "a certificate", time.Minute, func() error {
		return client.Sign(ctx, caclient.SignRequest{
			Token:  caclient.TokenFile(m.tokenFile(account)),
			CSR:    func(context.Context) ([]byte, error) { return csr, nil },
			Accept: func(s *caclient.Signed) error { signed = s; return nil },
		})
	}); err != nil {
		return nil, nil, err
	}
	bundle, err := identity.NewBundle(m.domain, identity.BundleConfig{Authorities: signed.Roots})
	if err != nil {
		return nil, nil, err
	}
	svid, err := identity.NewSVID(signed.Chain, key)
	return svid, bundle, err
}

// write puts the server's certificate into files: for HAProxy, which wants it in
// one, the key lies in the chain's as well.
func (m *mesh) write(server *identity.SVID) error {
	der, err := server.MarshalKey()
	if err != nil {
		return err
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if m.key, err = m.run.Write("server.key", key); err != nil {
		return err
	}
	m.chain, err = m.run.Write("server.pem", append(identity.EncodePEM(server.Certificates()...), key...))
	return err
}

// freeAddress finds a port on a host. Clients' own ports are on 127.0.0.1, so that
// on another host none of theirs takes it before it is used.
func freeAddress(host string) (string, error) {
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		return "", fmt.Errorf("finding a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().String(), nil
}
