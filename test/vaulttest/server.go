package vaulttest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshca/meshca/test/testenv"
)

// Server is a running Vault. Its methods are for one goroutine at a time.
type Server struct {
	binary  string
	dir     string
	address string // host and port
	process *testenv.Process
	client  *http.Client
	unseal  string
	root    string
}

// New starts a Vault that keeps its data in files, initialised and unsealed. It ends
// with the test.
func New(t testing.TB) *Server {
	t.Helper()
	s := Start(t, "")
	if err := s.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Unseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// Start starts a Vault that nobody has initialised. Named, it is a node of a cluster
// and stores by Raft; otherwise it stands alone and keeps its data in files.
func Start(t testing.TB, node string) *Server {
	t.Helper()
	cache, err := testenv.OpenCache(os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	binary, err := testenv.Vault(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{binary: binary, dir: t.TempDir()}
	if err := s.configure(node); err != nil {
		t.Fatalf("preparing Vault: %v", err)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.process.Kill(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// configure writes the configuration and makes the certificate that it serves with.
func (s *Server) configure(node string) error {
	ports, err := freePorts(2)
	if err != nil {
		return err
	}
	s.address = ports[0]
	cert, key, err := selfSigned()
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(cert)
	s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}, Timeout: 30 * time.Second}
	storage := fmt.Sprintf("storage \"file\" {\n  path = %q\n}\n", filepath.Join(s.dir, "data"))
	if node != "" {
		storage = fmt.Sprintf("storage \"raft\" {\n  path = %q\n  node_id = %q\n  performance_multiplier = 1\n}\n", filepath.Join(s.dir, "data"), node)
	}
	config := fmt.Sprintf(`disable_mlock = true
ui = false
api_addr = "https://%[1]s"
cluster_addr = "https://%[2]s"
listener "tcp" {
  address = %[1]q
  cluster_address = %[2]q
  tls_cert_file = %[3]q
  tls_key_file = %[4]q
}
`, ports[0], ports[1], s.CAFile(), filepath.Join(s.dir, "server.key")) + storage
	for name, content := range map[string][]byte{"server.crt": cert, "server.key": key, "vault.hcl": []byte(config)} {
		if err := os.WriteFile(filepath.Join(s.dir, name), content, 0o600); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Join(s.dir, "data"), 0o700)
}

// URL is the server's address, Address its host and port, CAFile the PEM file by which
// to verify it, and RootToken the token that may do anything.
func (s *Server) URL() string       { return "https://" + s.address }
func (s *Server) Address() string   { return s.address }
func (s *Server) CAFile() string    { return filepath.Join(s.dir, "server.crt") }
func (s *Server) RootToken() string { return s.root }

// Process is the server's process as it is now.
func (s *Server) Process() *testenv.Process { return s.process }

// Kill ends the server as kill -9 does.
func (s *Server) Kill() error { return s.process.Kill() }

// Restart starts the server, which is then sealed, and returns once it listens.
func (s *Server) Restart(ctx context.Context) error {
	p, err := testenv.Start(filepath.Join(s.dir, "log"), s.binary, "server", "-config="+filepath.Join(s.dir, "vault.hcl"))
	if err != nil {
		return err
	}
	s.process = p
	return s.await(ctx, 60*time.Second, "Vault to listen", func() error {
		if err := p.Exited(); err != nil {
			return err
		}
		_, err := s.Call(ctx, http.MethodGet, "sys/seal-status", nil)
		return err
	})
}

// Init initialises the server with one unseal key.
func (s *Server) Init(ctx context.Context) error {
	answer, err := s.Call(ctx, http.MethodPut, "sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1})
	if err != nil {
		return err
	}
	keys, _ := answer["keys_base64"].([]any)
	if len(keys) != 1 {
		return fmt.Errorf("initialising Vault: %d unseal keys", len(keys))
	}
	s.unseal, _ = keys[0].(string)
	s.root, _ = answer["root_token"].(string)
	return nil
}

// Join makes the server a node of another's cluster.
func (s *Server) Join(ctx context.Context, leader *Server) error {
	ca, err := os.ReadFile(leader.CAFile())
	if err != nil {
		return err
	}
	s.unseal, s.root = leader.unseal, leader.root
	_, err = s.Call(ctx, http.MethodPut, "sys/storage/raft/join", map[string]any{"leader_api_addr": leader.URL(), "leader_ca_cert": string(ca)})
	return err
}

// SendUnseal gives the server its key and returns without waiting.
func (s *Server) SendUnseal(ctx context.Context) error {
	_, err := s.Call(ctx, http.MethodPut, "sys/unseal", map[string]any{"key": s.unseal})
	return err
}

// Unseal unseals the server and returns once it serves.
func (s *Server) Unseal(ctx context.Context) error {
	if err := s.SendUnseal(ctx); err != nil {
		return err
	}
	return s.await(ctx, 60*time.Second, "Vault to be unsealed and active, or standby", func() error {
		h, err := s.Call(ctx, http.MethodGet, "sys/health?standbyok=true", nil)
		if err == nil && h["sealed"] == true {
			err = errors.New("it is sealed")
		}
		return err
	})
}

// Seal seals the server.
func (s *Server) Seal(ctx context.Context) error {
	_, err := s.Call(ctx, http.MethodPut, "sys/seal", nil)
	return err
}

// StatusError is an answer of Vault that is no success.
type StatusError struct {
	Code int
	Body string
}

func (e *StatusError) Error() string { return fmt.Sprintf("Vault answers %d: %s", e.Code, e.Body) }

// Call asks the server as root. It returns the answer's data, or all of an answer that
// has none.
func (s *Server) Call(ctx context.Context, method, path string, body map[string]any) (map[string]any, error) {
	return s.CallAs(ctx, s.root, method, path, body)
}

// CallAs asks the server with a token.
func (s *Server) CallAs(ctx context.Context, token, method, path string, body map[string]any) (map[string]any, error) {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.URL()+"/v1/"+path, content)
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("X-Vault-Token", token)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %w", method, path, &StatusError{resp.StatusCode, string(bytes.TrimSpace(answer))})
	}
	if len(answer) == 0 {
		return nil, nil
	}
	var all map[string]any
	if err := json.Unmarshal(answer, &all); err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	for _, part := range []string{"data", "auth", "wrap_info"} {
		if data, ok := all[part].(map[string]any); ok {
			return data, nil
		}
	}
	return all, nil
}

// Run runs a program with the environment that the vault command wants, as root, and
// returns what it prints.
func (s *Server) Run(ctx context.Context, env []string, name string, args ...string) ([]byte, error) {
	if name == "vault" {
		name = s.binary
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append([]string{
		"PATH=" + filepath.Dir(s.binary) + ":" + os.Getenv("PATH"), "HOME=" + s.dir,
		"VAULT_ADDR=" + s.URL(), "VAULT_CACERT=" + s.CAFile(), "VAULT_TOKEN=" + s.root,
	}, env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %q: %w\n%s%s", filepath.Base(name), args, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

func (s *Server) await(ctx context.Context, d time.Duration, what string, is func() error) error {
	deadline := time.NewTimer(d)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := is()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-deadline.C:
			return fmt.Errorf("waited %v for %s: %w\n%s", d, what, err, s.process.LogTail(20))
		case <-tick.C:
		}
	}
}

// freePorts are addresses on the loopback that nobody listens on.
func freePorts(n int) ([]string, error) {
	var all []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		all = append(all, l.Addr().String())
	}
	return all, nil
}

// selfSigned makes a certificate for 127.0.0.1 that vouches for itself.
func selfSigned() (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: "vault"},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}
