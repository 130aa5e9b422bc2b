package cluster

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"embed"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"text/template"
	"time"
)

//go:embed files
var files embed.FS

// A user is somebody whom the API server knows by a token: the parts of the
// control plane and of the node, each under the name that Kubernetes' own RBAC
// rules are written for.
type user struct {
	file, name, group string
}

var users = []user{
	{"admin", "admin", "system:masters"},
	{"controller-manager", "system:kube-controller-manager", ""},
	{"scheduler", "system:kube-scheduler", ""},
	{"kubelet", "system:node:" + NodeName, "system:nodes"},
	{"proxy", "system:kube-proxy", ""},
}

// values are what the templates in files/ may name.
type values struct {
	Dir, NodeIP, NodeName, PodCIDR, DNSIP, Bridge string
	Port                                          int
	User, Token                                   string // of a kubeconfig
	CoreDNS                                       string
}

func (c *Cluster) values() values {
	return values{Dir: c.dir, NodeIP: NodeIP, NodeName: NodeName, PodCIDR: podCIDR, DNSIP: dnsIP, Bridge: bridge, Port: apiPort, CoreDNS: coreDNSImage}
}

// writeConfig writes all files that the components read.
func (c *Cluster) writeConfig() error {
	for _, d := range []string{"components", "logs", "pki", "etcd", "kubelet", "containerd", "containerd-run", "cni", "volumeplugins", "images"} {
		if err := os.MkdirAll(filepath.Join(c.dir, d), 0o755); err != nil {
			return err
		}
	}
	var tokens bytes.Buffer
	for _, u := range users {
		v := c.values()
		v.User, v.Token = u.name, rand.Text()
		fmt.Fprintf(&tokens, "%s,%s,%s,%q\n", v.Token, u.name, u.name, u.group)
		if err := c.write(u.file+".kubeconfig", "files/kubeconfig.yaml", v); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(c.dir, "pki", "tokens.csv"), tokens.Bytes(), 0o600); err != nil {
		return err
	}
	for _, name := range []string{"kubelet.yaml", "containerd.toml", "cni/10-meshca.conflist", "resolv.conf"} {
		if err := c.write(name, "files/"+filepath.Base(name), c.values()); err != nil {
			return err
		}
	}
	return c.writeKeys()
}

func (c *Cluster) write(name, from string, v values) error {
	t, err := template.ParseFS(files, from)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := t.Execute(&out, v); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.dir, name), out.Bytes(), 0o600)
}

// writeKeys makes the key that ServiceAccount tokens are signed with, the API
// server's serving certificate, and the one that it shows to the kubelet: without
// that the kubelet's port would have to be open to all pods.
func (c *Cluster) writeKeys() error {
	pki := filepath.Join(c.dir, "pki")
	if err := c.NewServiceAccountKey(); err != nil {
		return err
	}
	caKey, caDER, err := certify(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test-cluster-clients"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	if err != nil {
		return err
	}
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(pki, "clients-ca.crt"), pemOf("CERTIFICATE", caDER), 0o600); err != nil {
		return err
	}
	key, der, err := certify(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver", Organization: []string{"system:masters"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, ca, caKey)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(pki, "kubelet-client.crt"), pemOf("CERTIFICATE", der), 0o600); err != nil {
		return err
	}
	return writeKey(filepath.Join(pki, "kubelet-client.key"), key)
}

// NewServiceAccountKey makes the key that tokens are signed with; another one
// where there is one already. The API server and the controller manager read it
// when they start.
func (c *Cluster) NewServiceAccountKey() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	pki := filepath.Join(c.dir, "pki")
	if err := os.WriteFile(filepath.Join(pki, "sa.pub"), pemOf("PUBLIC KEY", public), 0o600); err != nil {
		return err
	}
	return writeKey(filepath.Join(pki, "sa.key"), key)
}

func certify(t, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if parent == nil {
		parent, parentKey = t, key
	}
	t.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, nil, err
	}
	t.NotBefore, t.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(1, 0, 0)
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), parentKey)
	return key, der, err
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pemOf("EC PRIVATE KEY", der), 0o600)
}
