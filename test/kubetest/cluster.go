package kubetest

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
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/meshca/meshca/test/testenv"
)

// Issuer is the "iss" of every token that the API server makes.
const Issuer = "https://kubernetes.default.svc.cluster.local"

// Cluster is a running API server with its etcd. Its methods may be called
// concurrently.
type Cluster struct {
	dir       string
	url       string
	token     string
	client    *http.Client
	etcd, api *testenv.Process
}

// Start brings up a cluster with its files in dir, which stays the caller's to
// remove after Stop. It returns once the API server says that it is ready.
func Start(ctx context.Context, binaries testenv.KubernetesBinaries, dir string) (*Cluster, error) {
	if err := writeCredentials(dir); err != nil {
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
	ports, err := freePorts(3)
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
	etcdURL := "http://127.0.0.1:" + ports[0]
	c.etcd, err = testenv.Start(filepath.Join(dir, "etcd.log"), binaries.Etcd,
		"--data-dir="+filepath.Join(dir, fmt.Sprintf("etcd-%d", attempt)),
		"--listen-client-urls="+etcdURL,
		"--advertise-client-urls="+etcdURL,
		"--listen-peer-urls=http://127.0.0.1:"+ports[1],
		"--unsafe-no-fsync", // nothing here outlives the test
		"--log-level=warn",
	)
	if err != nil {
		return nil, err
	}
	c.api, err = testenv.Start(filepath.Join(dir, "kube-apiserver.log"), binaries.APIServer,
		"--etcd-servers="+etcdURL,
		"--cert-dir="+filepath.Join(dir, "serving"),
		"--bind-address=127.0.0.1",
		"--secure-port="+ports[2],
		"--service-cluster-ip-range=10.96.0.0/16",
		"--service-account-issuer="+Issuer,
		"--service-account-key-file="+filepath.Join(dir, "sa.pub"),
		"--service-account-signing-key-file="+filepath.Join(dir, "sa.key"),
		"--token-auth-file="+filepath.Join(dir, "tokens.csv"),
		"--authorization-mode=Node,RBAC",
		"--disable-admission-plugins=ServiceAccount", // its controller does not run here
		"--shutdown-delay-duration=0s",
	)
	if err != nil {
		return nil, err
	}
	if err := c.waitReady(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// waitReady polls /readyz. The API server makes its serving certificate as it
// starts, so the anchor is read at each try until it is there.
func (c *Cluster) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	last := errors.New("it made no serving certificate")
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the API server: %w; last: %w; its log:\n%s", context.Cause(ctx), last, c.api.LogTail(20))
		case <-c.etcd.Done():
			return c.etcd.Exited()
		case <-c.api.Done():
			return c.api.Exited()
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

// APIServer and Etcd are the processes, for tests that stop or kill them.
func (c *Cluster) APIServer() *testenv.Process { return c.api }

// Etcd is the store's process.
func (c *Cluster) Etcd() *testenv.Process { return c.etcd }

// Stop ends both processes and returns when they are gone. The API server
// would take up to a minute to end by itself and is not given that time.
func (c *Cluster) Stop() error {
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	var errs []error
	if c.api != nil {
		errs = append(errs, c.api.Stop(time.Second))
	}
	if c.etcd != nil {
		errs = append(errs, c.etcd.Stop(5*time.Second))
	}
	return errors.Join(errs...)
}

// adminToken opens an API server on loopback that lives as long as a test.
const adminToken = "kubetest-admin"

func writeCredentials(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
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

// freePorts returns different TCP ports that nobody listens on.
func freePorts(n int) ([]string, error) {
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
