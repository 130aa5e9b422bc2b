package certs

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func askOpenSSL(t *testing.T, f *fixture) verdicts {
	v := make(verdicts)
	for _, k := range f.kinds {
		v[cell{k.name, path}] = opensslVerify(t, k)
		if port := f.ports[k]; port != "" {
			client := runHeld
			args := []string{"s_client", "-connect", "127.0.0.1:" + port, "-CAfile", k.root, "-x509_strict", "-verify", "5", "-verify_return_error", "-tls1_3"}
			if k.host != "" {
				client = run
				args = append(args, "-verify_hostname", k.host, "-alpn", "h2", "-brief")
			} else {
				args = append(args, "-quiet", "-cert", k.leaf, "-cert_chain", k.intermediates, "-key", k.key)
			}
			said, err := client(t, "openssl", args...)
			if k.host != "" && strings.Contains(said, "Verification: OK") && strings.Contains(said, "Verified peername: "+k.host) {
				said = "protocol h2"
			}
			v.handshake(k, said, err)
		}
		if k.ours == nil {
			continue
		}
		s := start(t, "openssl", "s_server", "-accept", "127.0.0.1:0", "-tls1_3", "-rev", "-CAfile", k.root, "-x509_strict",
			"-Verify", "5", "-verify_return_error", "-cert", k.leaf, "-cert_chain", k.intermediates, "-key", k.key)
		port, err := s.await("ACCEPT 127.0.0.1:")
		must(t, err)
		v.dialled(t, k, port, "olleh")
	}
	return v
}

// opensslVerify verifies the path for each thing that the certificate is for.
func opensslVerify(t *testing.T, k *kind) string {
	t.Helper()
	args := []string{"verify", "-x509_strict", "-CAfile", k.root}
	if k.intermediates != "" {
		args = append(args, "-untrusted", k.intermediates)
	}
	usages := k.usages()
	if k.isCA() {
		usages = []string{"any"}
	}
	for _, usage := range usages {
		if out, err := run(t, "openssl", append(args, "-purpose", usage, k.leaf)...); err != nil {
			return usage + ": " + out
		}
	}
	// Whoever holds the CA's own key must not be able to call as anybody.
	if k.host != "" {
		if out, err := run(t, "openssl", append(args, "-purpose", "sslclient", k.leaf)...); err == nil {
			t.Errorf("the serving certificate is good for a client: %s", out)
		}
	}
	return ""
}

func askGnuTLS(t *testing.T, f *fixture) verdicts {
	v := make(verdicts)
	for _, k := range f.kinds {
		v[cell{k.name, path}] = gnutlsVerify(t, k)
		if port := f.ports[k]; port != "" {
			// There is no way to have gnutls-cli look for a SPIFFE ID. It may complain
			// of the missing host name, and of nothing else.
			client := runHeld
			args := []string{"--port", port, "--x509cafile", k.root}
			if k.host != "" {
				client = run
				args = append(args, "--verify-hostname", k.host, "--alpn", "h2")
			} else {
				args = append(args, "--insecure", "--x509certfile", k.chain, "--x509keyfile", k.key)
			}
			said, err := client(t, "gnutls-cli", append(args, "127.0.0.1")...)
			switch {
			case k.host != "" && strings.Contains(said, "- Status: The certificate is trusted.") && strings.Contains(said, "Application protocol: h2"):
				said = "protocol h2"
			case k.host == "" && !strings.Contains(said, "- Status: The certificate is NOT trusted. The name in the certificate does not match the expected. \n"):
				said = "not only the name: " + strings.ReplaceAll(said, "peer ", "")
			}
			v.handshake(k, said, err)
		}
		if k.ours == nil {
			continue
		}
		port := freePort(t)
		s := start(t, "gnutls-serv", "--port", port, "--echo", "--x509cafile", k.root, "--x509certfile", k.chain, "--x509keyfile", k.key,
			"--require-client-cert", "--verify-client-cert", "--priority", "NORMAL:-VERS-ALL:+VERS-TLS1.3")
		_, err := s.await("Echo Server listening on IPv4 0.0.0.0 port " + port + "...done")
		must(t, err)
		v.dialled(t, k, port, "hello")
	}
	return v
}

func gnutlsVerify(t *testing.T, k *kind) string {
	t.Helper()
	oids := map[string]string{"sslserver": "1.3.6.1.5.5.7.3.1", "sslclient": "1.3.6.1.5.5.7.3.2"}
	args := []string{"--verify", "--load-ca-certificate", k.root, "--infile", k.chain}
	if k.isCA() {
		out, err := run(t, "certtool", args...)
		return unless(err == nil, out)
	}
	for _, usage := range k.usages() {
		if out, err := run(t, "certtool", append(args, "--verify-purpose", oids[usage])...); err != nil {
			return usage + ": " + out
		}
	}
	if k.host != "" {
		if out, err := run(t, "certtool", append(args, "--verify-purpose", oids["sslclient"])...); err == nil {
			t.Errorf("the serving certificate is good for a client: %s", out)
		}
	}
	if k.name == "svid-rsa-2048" {
		if out, err := run(t, "certtool", append(args, "--verify-profile", "high")...); err == nil {
			t.Errorf("the high profile takes %s; docs/interop.md says that it does not: %s", k.name, out)
		}
	}
	return ""
}

func unless(good bool, reason string) string {
	if good {
		return ""
	}
	return reason
}

// freePort is for servers that do not tell which port they chose.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return portOf(l.Addr())
}

func askNode(t *testing.T, f *fixture) verdicts { return askScript(t, f, "node", "testdata/peer.mjs") }

func askPython(t *testing.T, f *fixture) verdicts {
	return askScript(t, f, "python3", "testdata/peer.py")
}

func askJava(t *testing.T, f *fixture) verdicts {
	// Compiled in memory, and for one second's work: no optimising compiler.
	return askScript(t, f, "java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "testdata/Peer.java")
}

// askScript runs one of our scripts in somebody else's language. It dials all
// that listens here, then serves for us.
func askScript(t *testing.T, f *fixture, name string, args ...string) verdicts {
	t.Helper()
	var rows strings.Builder
	for _, k := range f.kinds {
		port := f.ports[k]
		if port == "" {
			port = "0"
		}
		rows.WriteString(k.row(port))
	}
	file := filepath.Join(t.TempDir(), "rows")
	must(t, os.WriteFile(file, []byte(rows.String()), 0o600))
	p := start(t, name, append(args, file)...)
	v := make(verdicts)
	for _, k := range f.kinds {
		if f.ports[k] != "" {
			said, err := p.await("client\t" + k.name + "\t")
			must(t, err)
			v.handshake(k, said, nil)
		}
		if k.ours != nil {
			port, err := p.await("listening\t" + k.name + "\t")
			must(t, err)
			if strings.Contains(port, "refused") {
				v[cell{k.name, service}] = port
			} else {
				v.dialled(t, k, port, "peer "+k.id)
			}
		}
		if name == "java" {
			said, err := p.await("path\t" + k.name + "\t")
			must(t, err)
			v[cell{k.name, path}] = unless(said == "ok", said)
		}
	}
	return v
}
