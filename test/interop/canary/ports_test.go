package canary

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/big"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// Every port that the programs open is known, and none gives a certificate to
// somebody without a token; that the caller is on this machine counts for
// nothing.
func TestV14_NoPortIssuesToStrangers(t *testing.T) {
	w := newWorld(t)
	for _, tt := range []struct {
		program *process
		tcp     []string
		unix    int
	}{
		{w.ca, []string{w.caPort, w.caOps}, 0},
		{w.agent, []string{w.agentOps}, 1},
	} {
		tcp, unix := listeners(t, tt.program)
		slices.Sort(tt.tcp)
		if !slices.Equal(tcp, tt.tcp) || len(unix) != tt.unix {
			t.Errorf("%s listens on %q and %q; known are %q and %d sockets", tt.program.name, tcp, unix, tt.tcp, tt.unix)
		}
		for _, port := range tcp {
			w.tryPlain(t, port)
		}
	}
	svid := w.keysFromSocket(t, 1)
	for name, certificates := range map[string][]tls.Certificate{
		"nobody":      nil,
		"self-signed": {selfSigned(t)},
		"an SVID":     {pair(t, svid.GetX509Svid(), svid.GetX509SvidKey())},
	} {
		conn := w.dialCA(t, certificates...)
		if code := tryCreate(t, conn); code != codes.Unauthenticated {
			t.Errorf("%s: CreateCertificate: %v; want Unauthenticated", name, code)
		}
		if code := tryDelta(t, conn); code != codes.Unauthenticated {
			t.Errorf("%s: DeltaAggregatedResources: %v; want Unauthenticated", name, code)
		}
	}
	// The way that is open is open: what refuses above is not a broken server.
	if _, err := create(t, w.dialCA(t), newCSR(t, nil), "Bearer "+w.good(t)); err != nil {
		t.Errorf("with a good token: %v", err)
	}
}

// tryPlain asks a port without TLS, by gRPC and by plain HTTP.
func (w *world) tryPlain(t *testing.T, port string) {
	t.Helper()
	conn := dial(t, "passthrough:"+port, insecure.NewCredentials())
	if code := tryCreate(t, conn); code == codes.OK {
		t.Errorf("%s: a certificate without TLS", port)
	}
	if code := tryDelta(t, conn); code == codes.OK {
		t.Errorf("%s: delta xDS without TLS", port)
	}
	for _, path := range []string{"/", "/istio.v1.auth.IstioCertificateService/CreateCertificate", "/sign", "/debug", "/v1/pki"} {
		if code, body, err := get(port, path); err == nil && code == http.StatusOK {
			t.Errorf("%s%s: %q", port, path, body)
		}
	}
}

func tryCreate(t *testing.T, conn *grpc.ClientConn) codes.Code {
	t.Helper()
	_, err := create(t, conn, newCSR(t, nil))
	return status.Code(err)
}

func tryDelta(t *testing.T, conn *grpc.ClientConn) codes.Code {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err == nil {
		_ = stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/meshca.v1.Workload"})
		_, err = stream.Recv()
	}
	return status.Code(err)
}

// listeners are the addresses and paths that a process listens on, by the
// kernel's own tables. A path is the one that was bound: it says how many there
// are, and not where they have been moved to.
func listeners(t *testing.T, p *process) (tcp, unix []string) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d", p.PID())
	own := make(map[string]bool) // by inode
	fds, err := os.ReadDir(proc + "/fd")
	must(t, err)
	for _, fd := range fds {
		if target, err := os.Readlink(proc + "/fd/" + fd.Name()); err == nil {
			if inode, ok := strings.CutPrefix(target, "socket:["); ok {
				own[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	const listening = "0A"
	for _, table := range []string{"tcp", "tcp6"} {
		for _, row := range rows(t, proc+"/net/"+table) {
			if row[3] == listening && own[row[9]] {
				tcp = append(tcp, address(t, row[1]))
			}
		}
	}
	// One of these has no state: bound is enough.
	for _, table := range []string{"udp", "udp6", "raw", "raw6"} {
		for _, row := range rows(t, proc+"/net/"+table) {
			if own[row[9]] {
				t.Errorf("%s has a socket of %s at %s", p.name, table, row[1])
			}
		}
	}
	const accepts = "00010000"
	for _, row := range rows(t, proc+"/net/unix") {
		if row[3] == accepts && own[row[6]] {
			unix = append(unix, strings.Join(row[7:], " "))
		}
	}
	slices.Sort(tcp)
	slices.Sort(unix)
	return tcp, unix
}

// rows are the lines of a table of the kernel's, without its head.
func rows(t *testing.T, file string) [][]string {
	t.Helper()
	content, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return nil // no IPv6 here
	}
	must(t, err)
	var out [][]string
	for i, line := range strings.Split(strings.TrimSpace(string(content)), "\n") {
		if i > 0 {
			out = append(out, strings.Fields(line))
		}
	}
	return out
}

// address reads 0100007F:1F90: words of the machine's own byte order, then the
// port.
func address(t *testing.T, text string) string {
	t.Helper()
	host, port, _ := strings.Cut(text, ":")
	b, err := hex.DecodeString(host)
	must(t, err)
	for i := 0; i < len(b); i += 4 {
		binary.BigEndian.PutUint32(b[i:], binary.NativeEndian.Uint32(b[i:]))
	}
	ip, ok := netip.AddrFromSlice(b)
	var n uint16
	if _, err := fmt.Sscanf(port, "%X", &n); err != nil || !ok {
		t.Fatalf("%q is no address", text)
	}
	return netip.AddrPortFrom(ip.Unmap(), n).String()
}

func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func pair(t *testing.T, chain, pkcs8 []byte) tls.Certificate {
	t.Helper()
	certificates, err := x509.ParseCertificates(chain)
	must(t, err)
	key, err := x509.ParsePKCS8PrivateKey(pkcs8)
	must(t, err)
	out := tls.Certificate{PrivateKey: key}
	for _, c := range certificates {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out
}
