package kubetest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/meshca/meshca/test/testenv"
)

// Issuer is the "iss" of every token that the API server makes.
const Issuer = "https://kubernetes.default.svc.cluster.local"

// Cluster is a running API server with its etcd. Its methods may be called
// concurrently.
type Cluster struct {
	dir     string
	url     string
	etcdURL string
	token   string
	client  *http.Client

	mu        sync.Mutex
	etcd, api *testenv.Process // by mu: tests start them anew

	etcdCommand, apiCommand []string // the binary and its arguments
}

// Option changes a cluster before it starts.
type Option func(*options)

type options struct{ rsaTokens bool }

// RSATokens has ServiceAccount tokens signed with a key of RSA 2048, as kubeadm
// makes it; without, it is P-256.
func RSATokens(o *options) { o.rsaTokens = true }

// Start brings up a cluster with its files in dir, which stays the caller's to
// remove after Stop. It returns once the API server says that it is ready.
func Start(ctx context.Context, binaries testenv.KubernetesBinaries, dir string, opts ...Option) (*Cluster, error) {
	var o options
	for _, set := range opts {
		set(&o)
	}
	if err := writeCredentials(dir, o); err != nil {
		return nil, fmt.Errorf("preparing a cluster: %w", err)
	}
	// The ports were free a moment ago. Somebody may take one before we do:
	// then another attempt gets others.
	var err error
	for attempt := range 3 {
		var c *Cluster
		c, err = start(ctx, binaries, dir, attempt)
		if err == nil {
			return c, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

func start(ctx context.Context, binaries testenv.KubernetesBinaries, dir string, attempt int) (_ *Cluster, err error) {
	ports, err := FreePorts(3)
	if err != nil {
		return nil, err
	}
	c := &Cluster{
		dir:   dir,
		url:   "https://127.0.0.1:" + ports[2],
		token: adminToken,
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop())
		}
	}()
	c.etcdURL = "http://127.0.0.1:" + ports[0]
	c.etcdCommand = []string{
		binaries.Etcd,
		"--data-dir=" + filepath.Join(dir, fmt.Sprintf("etcd-%d", attempt)),
		"--listen-client-urls=" + c.etcdURL,
		"--advertise-client-urls=" + c.etcdURL,
		"--listen-peer-urls=http://127.0.0.1:" + ports[1],
		"--unsafe-no-fsync", // nothing here outlives the test
		"--log-level=warn",
	}
	c.apiCommand = []string{
		binaries.APIServer,
		"--etcd-servers=" + c.etcdURL,
		"--cert-dir=" + filepath.Join(dir, "serving"),
		"--bind-address=127.0.0.1",
		"--secure-port=" + ports[2],
		"--service-cluster-ip-range=10.96.0.0/16",
		"--service-account-issuer=" + Issuer,
		"--service-account-key-file=" + filepath.Join(dir, "sa.pub"),
		"--service-account-signing-key-file=" + filepath.Join(dir, "sa.key"),
		"--token-auth-file=" + filepath.Join(dir, "tokens.csv"),
		"--authorization-mode=Node,RBAC",
		"--allow-privileged",                         // as wherever there are network plugins
		"--disable-admission-plugins=ServiceAccount", // its controller does not run here
		"--shutdown-delay-duration=0s",
	}
	if err := c.startEtcd(); err != nil {
		return nil, err
	}
	if err := c.startAPIServer(); err != nil {
		return nil, err
	}
	if err := c.waitReady(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Cluster) startEtcd() error {
	return c.start(&c.etcd, "etcd.log", c.etcdCommand)
}

func (c *Cluster) startAPIServer() error {
	return c.start(&c.api, "kube-apiserver.log", c.apiCommand)
}

func (c *Cluster) start(into **testenv.Process, log string, command []string) error {
	p, err := testenv.Start(filepath.Join(c.dir, log), command[0], command[1:]...)
	c.mu.Lock()
	defer c.mu.Unlock()
	*into = p
	return err
}

// waitReady polls /readyz. The API server makes its serving certificate as it
// starts, so the anchor is read at each try until it is there.
func (c *Cluster) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	etcd, api := c.Etcd(), c.APIServer()
	last := errors.New("it made no serving certificate")
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the API server: %w; last: %w; its log:\n%s", context.Cause(ctx), last, api.LogTail(20))
		case <-etcd.Done():
			return etcd.Exited()
		case <-api.Done():
			return api.Exited()
		case <-tick.C:
		}
		if c.client == nil {
			client, err := pinnedClient(c.CAFile())
			if err != nil {
				continue
			}
			c.client = client
		}
		if _, last = c.Get(ctx, "/readyz"); last == nil {
			return nil
		}
	}
}

// URL is where the API server listens.
func (c *Cluster) URL() string { return c.url }

// CAFile is a PEM file with the anchor for the API server's certificate.
func (c *Cluster) CAFile() string { return filepath.Join(c.dir, "serving", "apiserver.crt") }

// AdminToken is a bearer token that may do everything.
func (c *Cluster) AdminToken() string { return c.token }

// APIServer and Etcd are the processes, for tests that stop or kill them.
func (c *Cluster) APIServer() *testenv.Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.api
}

// Etcd is the store's process.
func (c *Cluster) Etcd() *testenv.Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.etcd
}

// Stop ends both processes and returns when they are gone. The API server
// would take up to a minute to end by itself and is not given that time.
func (c *Cluster) Stop() error {
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	var errs []error
	if api := c.APIServer(); api != nil {
		errs = append(errs, api.Stop(time.Second))
	}
	if etcd := c.Etcd(); etcd != nil {
		errs = append(errs, etcd.Stop(5*time.Second))
	}
	return errors.Join(errs...)
}

// adminToken opens an API server on loopback that lives as long as a test.
const adminToken = "kubetest-admin"

func writeCredentials(dir string, o options) error {
	var key crypto.Signer
	var err error
	if o.rsaTokens {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"sa.key":     pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
		"sa.pub":     pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}),
		"tokens.csv": []byte(adminToken + `,admin,admin,"system:masters"` + "\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func pinnedClient(caFile string) (*http.Client, error) {
	anchor, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(anchor) {
		return nil, fmt.Errorf("%q holds no certificate", caFile)
	}
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13},
		ForceAttemptHTTP2: true,
	}}, nil
}

// FreePorts returns different TCP ports that nobody listens on.
func FreePorts(n int) ([]string, error) {
	ports := make([]string, 0, n)
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("finding a free port: %w", err)
		}
		defer l.Close() // all are held until the last is found
		ports = append(ports, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	}
	return ports, nil
}
