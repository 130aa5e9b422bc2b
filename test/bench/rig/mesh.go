package rig

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/test/kubetest"
	"github.com/meshca/meshca/test/testenv"
)

// Namespace is where the CA, the agents and all pods are.
const Namespace = "bench"

// The ServiceAccounts of pods.
const (
	appAccount   = "app"
	agentAccount = "meshca-agent"
)

// Mesh is a CA as it runs in a cluster, over a real API server: pods and their
// ServiceAccount tokens are the API server's, and the CA follows pods there.
type Mesh struct {
	run     *Run
	Cluster *kubetest.Cluster
	CA      *testenv.Process
	Address string // of the CA's CSR API and xDS
	Ops     string // of its metrics
	Roots   *x509.CertPool
	Anchor  string // the file that Roots come from
	args    []string
	stops   []func() error
}

// Pod is one that runs, as far as objects go, with its token for the CA.
type Pod struct {
	Name, Account, UID, Node, Token string
}

// StartMesh starts the API server and the CA, whose processes end with Stop.
// Arguments are added to those of "meshca serve".
func (r *Run) StartMesh(ctx context.Context, args ...string) (m *Mesh, err error) {
	m = &Mesh{run: r}
	stop := m.Stop // what is returned besides an error is nil
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	binaries, err := testenv.Kubernetes(ctx, r.Cache)
	if err != nil {
		return nil, err
	}
	program, err := r.Program(ctx, "./cmd/meshca")
	if err != nil {
		return nil, err
	}
	r.Say("starting Kubernetes' API server")
	if m.Cluster, err = kubetest.Start(ctx, binaries, r.Dir, kubetest.RSATokens); err != nil {
		return nil, err
	}
	m.stops = append(m.stops, m.Cluster.Stop)
	if err := m.Cluster.CreateNamespace(ctx, Namespace); err != nil {
		return nil, err
	}
	for _, name := range []string{appAccount, agentAccount} {
		if _, err := m.Cluster.CreateServiceAccount(ctx, Namespace, name); err != nil {
			return nil, err
		}
	}
	if err := m.configure(program, args); err != nil {
		return nil, err
	}
	r.Say("starting the CA")
	return m, m.StartCA(ctx)
}

func (m *Mesh) configure(program string, args []string) error {
	ports, err := kubetest.FreePorts(2)
	if err != nil {
		return err
	}
	m.Address, m.Ops = "localhost:"+ports[0], "127.0.0.1:"+ports[1]
	token, err := m.run.Write("token", []byte(m.Cluster.AdminToken()))
	if err != nil {
		return err
	}
	kubeconfig, err := m.run.Write("kubeconfig", fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: bench, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: ca, user: {tokenFile: %q}}]
contexts: [{name: bench, context: {cluster: bench, user: ca}}]
current-context: bench
`, m.Cluster.URL(), m.Cluster.CAFile(), token))
	if err != nil {
		return err
	}
	config, err := m.run.Write("meshca.yaml", fmt.Appendf(nil, "root_namespace: %[1]s\nkubernetes: {issuer: %[2]q, agents: [%[1]s/%[3]s], agents_namespace: %[1]s}\n%[4]s",
		Namespace, kubetest.Issuer, agentAccount, m.run.MeshConfig))
	if err != nil {
		return err
	}
	m.args = append([]string{program, "serve", "--config", config, "--kubeconfig", kubeconfig, "--namespace", Namespace,
		"--listen", "127.0.0.1:" + ports[0], "--ops-listen", m.Ops, "--audit-log", filepath.Join(m.run.Dir, "audit.jsonl")}, args...)
	return nil
}

// StartCA starts the CA, anew if it ran before, and returns when it is ready.
func (m *Mesh) StartCA(ctx context.Context) error {
	p, stop, err := m.run.Start("meshca", m.args[0], m.args[1:]...)
	if err != nil {
		return err
	}
	if m.CA == nil {
		m.stops = append(m.stops, func() error { return stop() })
	} else {
		m.stops[len(m.stops)-1] = stop
	}
	m.CA = p
	if err := Ready(ctx, "the CA", m.Ops, p); err != nil {
		return err
	}
	return Poll(ctx, "the trust anchor", time.Minute, func() error { return m.readAnchor(ctx) })
}

// Ready waits until a program of ours says on its ops address that it is ready, or has
// ended.
func Ready(ctx context.Context, what, ops string, p *testenv.Process) error {
	return Poll(ctx, what+" to be ready", time.Minute, func() error {
		if err := p.Exited(); err != nil {
			return fmt.Errorf("%w: %w", errOver, err)
		}
		resp, err := http.Get("http://" + ops + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("it answers %s", resp.Status)
		}
		return nil
	})
}

func (m *Mesh) readAnchor(ctx context.Context) error {
	body, err := m.Cluster.Get(ctx, "/api/v1/namespaces/"+Namespace+"/configmaps/"+trust.ConfigMapName)
	if err != nil {
		return err
	}
	var object struct{ Data map[string]string }
	if err := json.Unmarshal(body, &object); err != nil {
		return err
	}
	anchor := []byte(object.Data[trust.ConfigMapKey])
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(anchor) {
		return errors.New("it holds no certificate")
	}
	m.Roots = roots
	m.Anchor, err = m.run.Write("root.pem", anchor)
	return err
}

// Metric is the sum of a metric of the CA over its labels.
func (m *Mesh) Metric(ctx context.Context, name string) (sum float64, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+m.Ops+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("reading the CA's metrics: %w", err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		value, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			return 0, fmt.Errorf("reading the CA's metric %s: %w", name, err)
		}
		sum += value
	}
	return sum, nil
}

// Stop ends all processes.
func (m *Mesh) Stop() error {
	var errs []error
	for i := len(m.stops) - 1; i >= 0; i-- {
		errs = append(errs, m.stops[i]())
	}
	return errors.Join(errs...)
}

// Dial connects to the CA as an agent does, with a connection of its own.
func (m *Mesh) Dial(options ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+m.Address, append([]grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: m.Roots, ServerName: "localhost", MinVersion: tls.VersionTLS13})),
	}, options...)...)
}

// Pods makes pods spread over nodes, each with a token, and returns them in order
// of nodes. Agents are pods of the agents' ServiceAccount.
func (m *Mesh) Pods(ctx context.Context, prefix string, nodes, perNode int, agents bool) ([]Pod, error) {
	account := appAccount
	if agents {
		account = agentAccount
	}
	m.run.Say("making %d pods on %d nodes", nodes*perNode, nodes)
	all := make([]Pod, nodes*perNode)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(16)
	for n := range nodes {
		node := fmt.Sprintf("%s-node-%d", prefix, n)
		group.Go(func() error {
			if _, err := m.Cluster.CreateNode(ctx, node); err != nil {
				return err
			}
			for i := range perNode {
				p, err := m.pod(ctx, fmt.Sprintf("%s-%d-%d", prefix, n, i), account, node)
				if err != nil {
					return err
				}
				all[n*perNode+i] = p
			}
			return nil
		})
	}
	return all, group.Wait()
}

// AgentPod makes the pod of the agent of a node that Pods has made.
func (m *Mesh) AgentPod(ctx context.Context, node string) (Pod, error) {
	return m.pod(ctx, "agent-"+node, agentAccount, node)
}

func (m *Mesh) pod(ctx context.Context, name, account, node string) (p Pod, err error) {
	p = Pod{Name: name, Account: account, Node: node}
	if p.UID, err = m.Cluster.CreatePod(ctx, Namespace, name, account, node); err != nil {
		return p, err
	}
	p.Token, err = m.Cluster.Token(ctx, Namespace, account, kubetest.TokenRequest{
		Audiences: []string{"meshca"}, Seconds: 3600, PodName: name, PodUID: p.UID,
	})
	return p, err
}

// CSR makes a new P-256 key and its request, in PEM.
func CSR() (string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}
