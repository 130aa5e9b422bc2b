package cacerts

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Files of Istio's recipe for one cluster.
const (
	CertFile  = "ca-cert.pem"
	KeyFile   = "ca-key.pem"
	ChainFile = "cert-chain.pem"
	RootFile  = "root-cert.pem"
)

// root and intermediate say to openssl what Istio's recipe has it make: usages that a
// CA has no need of, and a server's name in the intermediate, are part of it.
const rootConfig = `
[req]
prompt = no
encrypt_key = no
utf8 = yes
default_md = sha256
distinguished_name = name
req_extensions = ext
[name]
O = Istio
CN = Root CA
[ext]
subjectKeyIdentifier = hash
basicConstraints = critical, CA:true
keyUsage = critical, digitalSignature, nonRepudiation, keyEncipherment, keyCertSign
`

const intermediateConfig = `
[req]
prompt = no
encrypt_key = no
utf8 = yes
default_md = sha256
distinguished_name = name
req_extensions = ext
[name]
O = Istio
CN = Intermediate CA
L = cluster1
[ext]
subjectKeyIdentifier = hash
basicConstraints = critical, CA:true, pathlen:%d
keyUsage = critical, digitalSignature, nonRepudiation, keyEncipherment, keyCertSign
subjectAltName = DNS:istiod.istio-system.svc
`

// Make makes a root and an intermediate of the given path length, with RSA keys of 4096
// bits, and returns the directory with the four files of the Secret cacerts. Istio's
// recipe has path length 0.
func Make(tb testing.TB, pathLength int) (dir string) {
	tb.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		tb.Skipf("openssl is not installed: %v", err)
	}
	top := tb.TempDir()
	dir = filepath.Join(top, "cluster1")
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(top, name) }
	in := func(name string) string { return filepath.Join(dir, name) }
	write(tb, at("root.conf"), []byte(rootConfig))
	write(tb, at("intermediate.conf"), fmt.Appendf(nil, intermediateConfig, pathLength))

	openssl(tb, "genrsa", "-out", at("root-key.pem"), "4096")
	openssl(tb, "req", "-sha256", "-new", "-key", at("root-key.pem"), "-config", at("root.conf"), "-out", at("root.csr"))
	openssl(tb, "x509", "-req", "-sha256", "-days", "3650", "-signkey", at("root-key.pem"), "-extensions", "ext", "-extfile", at("root.conf"),
		"-in", at("root.csr"), "-out", in(RootFile))

	openssl(tb, "genrsa", "-out", in(KeyFile), "4096")
	openssl(tb, "req", "-sha256", "-new", "-key", in(KeyFile), "-config", at("intermediate.conf"), "-out", at("intermediate.csr"))
	openssl(tb, "x509", "-req", "-sha256", "-days", "730", "-CA", in(RootFile), "-CAkey", at("root-key.pem"), "-CAcreateserial", "-CAserial", at("root.srl"),
		"-extensions", "ext", "-extfile", at("intermediate.conf"), "-in", at("intermediate.csr"), "-out", in(CertFile))
	write(tb, in(ChainFile), append(read(tb, in(CertFile)), read(tb, in(RootFile))...))
	return dir
}

// TLSLayout makes of the files that [Make] made those that cert-manager would write: the
// names of a Secret of type kubernetes.io/tls, and the key in PKCS#1.
func TLSLayout(tb testing.TB, cacerts string) (dir string) {
	tb.Helper()
	dir = filepath.Join(tb.TempDir(), "tls")
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	write(tb, filepath.Join(dir, "tls.crt"), read(tb, filepath.Join(cacerts, CertFile)))
	write(tb, filepath.Join(dir, "ca.crt"), read(tb, filepath.Join(cacerts, RootFile)))
	openssl(tb, "rsa", "-traditional", "-in", filepath.Join(cacerts, KeyFile), "-out", filepath.Join(dir, "tls.key"))
	if key := read(tb, filepath.Join(dir, "tls.key")); !bytes.HasPrefix(key, []byte("-----BEGIN RSA PRIVATE KEY-----")) {
		tb.Fatal("openssl did not write PKCS#1")
	}
	return dir
}

func openssl(tb testing.TB, args ...string) string {
	tb.Helper()
	out, err := exec.Command("openssl", args...).CombinedOutput()
	if err != nil {
		tb.Fatalf("openssl %q: %v\n%s", args, err, out)
	}
	return string(out)
}

func read(tb testing.TB, name string) []byte {
	tb.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func write(tb testing.TB, name string, data []byte) {
	tb.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		tb.Fatal(err)
	}
}
