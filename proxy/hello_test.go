package proxy

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/policy"
)

// Extensions that these tests write (RFC 8446 §4.2, RFC 6066 §3, RFC 9849).
const (
	extensionServerName = 0
	extensionPSK        = 41
	extensionEarlyData  = 42
	extensionVersions   = 43
	extensionECH        = 0xfe0d
)

type extension struct {
	kind    int
	content []byte
}

// helloOf is the ClientHello that crypto/tls makes, with these extensions in
// place of its own of their kinds, or added to them. pre_shared_key has to be
// the last.
func helloOf(t testing.TB, alpn []string, change ...extension) []byte {
	t.Helper()
	message := recordHello(&tls.Config{InsecureSkipVerify: true, NextProtos: alpn})[recordHeader:] //nolint:gosec // only its hello is wanted
	at := extensionsAt(message)
	all := extensionsOf(t, message[at:])
	for _, c := range change {
		if i := slices.IndexFunc(all, func(e extension) bool { return e.kind == c.kind }); i >= 0 {
			all[i] = c
		} else {
			all = append(all, c)
		}
	}
	return helloWith(message[:at], all)
}

func extensionsOf(t testing.TB, p []byte) (all []extension) {
	t.Helper()
	r := reader{rest: p}
	r = reader{rest: r.vector(2)}
	for len(r.rest) > 0 {
		all = append(all, extension{r.number(2), r.vector(2)})
	}
	if r.broken {
		t.Fatal("a hello of crypto/tls is broken")
	}
	return all
}

// helloWith puts extensions behind the fields of a hello, and makes records of it.
func helloWith(fields []byte, all []extension) []byte {
	var list []byte
	for _, e := range all {
		list = binary.BigEndian.AppendUint16(list, uint16(e.kind))
		list = append(list, vector(2, e.content)...)
	}
	message := append(bytes.Clone(fields), vector(2, list)...)
	put24(message[1:], len(message)-handshakeHeader)
	return splitRecords(record(message), maxRecord)
}

// vector puts a length of so many bytes in front of p.
func vector(lengthBytes int, p []byte) []byte {
	length := binary.BigEndian.AppendUint32(nil, uint32(len(p)))
	return append(length[4-lengthBytes:], p...)
}

// serverName is a name of type host_name.
func serverName(name string) extension {
	return extension{extensionServerName, vector(2, append([]byte{0}, vector(2, []byte(name))...))}
}

func protocols(names ...string) extension {
	var list []byte
	for _, n := range names {
		list = append(list, vector(1, []byte(n))...)
	}
	return extension{extensionALPN, vector(2, list)}
}

// outerECH is what a client of ECH sends in the clear, about a key that nobody
// here has.
func outerECH() extension {
	content := []byte{0, 0, 1, 0, 1, 7} // outer, HKDF-SHA256 and AES-128-GCM, configuration 7
	content = append(content, vector(2, random(32))...)
	return extension{extensionECH, append(content, vector(2, random(200))...)}
}

// psk offers a session that was never opened here.
func psk() extension {
	identities := append(vector(2, random(100)), 0, 0, 0, 1)
	binders := vector(1, random(32))
	return extension{extensionPSK, append(vector(2, identities), vector(2, binders)...)}
}

// Hellos of every shape. Under DISABLE the app gets each as it came. Under
// PERMISSIVE that holds for those that offer no istio name; all others, and all
// under STRICT, are answered by us or end here.
func TestV25_HelloShapes(t *testing.T) {
	const answered, malformed, refused = "answered", "hello malformed", "protocol error"
	mesh := []string{"istio"}
	many := []string{"istio"}
	for i := range 254 {
		many = append([]string{fmt.Sprintf("name-%d", i)}, many...)
	}
	grease := []extension{
		{0x1a1a, nil}, {0x2a2a, []byte{0}}, {extensionVersions, []byte{4, 0x3a, 0x3a, 3, 4}}, protocols("\x4a\x4a", "istio"),
	}
	early := append(helloOf(t, mesh, extension{extensionEarlyData, nil}, psk()), recordData, 3, 3, 0, 5, 'h', 'e', 'l', 'l', 'o')
	earlyForeign := append(helloOf(t, nil, extension{extensionEarlyData, nil}, psk()), recordData, 3, 3, 0, 5, 'h', 'e', 'l', 'l', 'o')
	twice := helloOf(t, mesh)
	message := twice[recordHeader:]
	at := extensionsAt(message)
	twice = helloWith(message[:at], append(extensionsOf(t, message[at:]), protocols("istio")))

	for _, tt := range []struct {
		name               string
		bytes              []byte
		permissive, strict string
	}{
		{"no server name", helloOf(t, mesh), answered, answered},
		{"an address as server name", helloOf(t, mesh, serverName("10.0.0.1")), answered, answered},
		{"a server name of 255 bytes", helloOf(t, mesh, serverName(strings.Repeat("a", 255))), answered, answered},
		{"a NUL in the server name", helloOf(t, mesh, serverName("cart\x00.test")), answered, answered},
		{"an empty server name", helloOf(t, mesh, serverName("")), refused, refused},
		{"a foreign hello with a NUL in the server name", helloOf(t, nil, serverName("cart\x00.test")), "echo", answered},
		{"255 protocols, the last is istio", helloOf(t, nil, protocols(many...)), answered, answered},
		{"255 protocols, none of them istio's", helloOf(t, nil, protocols(many[:254]...)), "echo", answered},
		{"no protocols in the list", helloOf(t, nil, protocols()), malformed, malformed},
		{"an empty extension for protocols", helloOf(t, nil, extension{extensionALPN, nil}), malformed, malformed},
		{"a protocol without a name", helloOf(t, nil, protocols("istio", "")), malformed, malformed},
		{"two lists of protocols", twice, malformed, malformed},
		{"istio within a longer name", helloOf(t, nil, protocols("x-istio")), "echo", answered},
		{"ISTIO in upper case", helloOf(t, nil, protocols("ISTIO")), "echo", answered},
		{"a NUL before istio", helloOf(t, nil, protocols("\x00istio")), "echo", answered},
		{"GREASE", helloOf(t, mesh, grease...), answered, answered},
		{"the outer hello of ECH", helloOf(t, mesh, outerECH()), answered, answered},
		{"the outer hello of ECH, foreign", helloOf(t, nil, outerECH()), "echo", answered},
		{"a session that was never opened", helloOf(t, mesh, psk()), answered, answered},
		{"early data", early, refused, refused},
		{"early data, foreign", earlyForeign, "echo", refused},
	} {
		for mode, want := range map[policy.Mode]string{policy.Disable: "echo", policy.Permissive: tt.permissive, policy.Strict: tt.strict} {
			t.Run(fmt.Sprintf("%s under %s", tt.name, mode), func(t *testing.T) {
				k := start(t, withMode(mode))
				conn := k.dial()
				if _, err := conn.Write(tt.bytes); err != nil {
					t.Fatal(err)
				}
				switch want {
				case "echo":
					got := make([]byte, len(tt.bytes))
					if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, tt.bytes) {
						t.Errorf("%d bytes came back, %v", len(got), err)
					}
					k.app.accepted(t)
				case answered: // by a ServerHello
					got := make([]byte, recordHeader+1)
					if _, err := io.ReadFull(conn, got); err != nil || got[0] != recordHandshake || got[recordHeader] != 2 {
						t.Errorf("% x, %v", got, err)
					}
				default: // by nothing but an alert
					got, err := io.ReadAll(conn)
					if err != nil && !isReset(err) || len(got) > 0 && got[0] != recordAlert {
						t.Errorf("% x, %v", got, err)
					}
				}
				_ = conn.Close()
				if line := k.next(nil); want != "echo" && want != answered && line["failure"] != want {
					t.Errorf("%v", line)
				}
				k.app.untouched(t)
			})
		}
	}
}

// TLS in mutual TLS is the app's affair, whatever it offers: what is inside is
// not looked at.
func TestV25_TLSInsideTLS(t *testing.T) {
	for _, mode := range []policy.Mode{policy.Permissive, policy.Strict} {
		for _, alpn := range [][]string{{"istio"}, {"h2"}} {
			k := start(t, withMode(mode), withApp(tlsApp(t)))
			outer := k.dialTLS(k.meshConfig(frontendID, "istio"))
			inner := tls.Client(outer, k.meshConfig(frontendID, alpn...))
			if err := inner.Handshake(); err != nil {
				t.Fatal(err)
			}
			if who := inner.ConnectionState().PeerCertificates[0].URIs[0].String(); who != "spiffe://app.test/app" {
				t.Errorf("%s: the inner TLS ended at %s", mode, who)
			}
			echoes(t, inner, "hello")
			_ = inner.Close()
			k.next(map[string]any{"security": "mutual TLS", "spiffe_id": frontendID})
		}
	}
}

// A server that greets, and a client that waits for it: served under DISABLE at
// once and under PERMISSIVE after detection (see above), and under STRICT only
// inside mutual TLS.
func TestV25_ServerFirst(t *testing.T) {
	hears := func(t *testing.T, conn io.Reader) {
		t.Helper()
		got := make([]byte, len(greeting))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != greeting {
			t.Errorf("%q, %v", got, err)
		}
	}
	t.Run("DISABLE", func(t *testing.T) {
		k := start(t, withMode(policy.Disable), withApp(newApp(t, greet)))
		hears(t, k.dial())
	})
	t.Run("STRICT", func(t *testing.T) {
		k := start(t, with(hasty), withApp(newApp(t, greet)))
		ended(t, k.dial())
		k.next(map[string]any{"end": "handshake failed", "failure": "timeout"})
		k.app.untouched(t)
	})
	for _, mode := range []policy.Mode{policy.Permissive, policy.Strict} {
		t.Run("mutual TLS under "+mode.String(), func(t *testing.T) {
			k := start(t, withMode(mode), withApp(newApp(t, greet)))
			hears(t, k.dialTLS(k.meshConfig(frontendID, "istio")))
		})
	}
}

// Old TLS is the app's affair where TLS is, and ends here where it is ours.
func TestV25_OldVersions(t *testing.T) {
	const through, refused = "passed through", "old tls"
	for _, version := range []uint16{tls.VersionTLS10, tls.VersionTLS11, tls.VersionTLS12} {
		for _, tt := range []struct {
			alpn []string
			mode policy.Mode
			want string
		}{
			{[]string{"istio"}, policy.Disable, through},
			{[]string{"istio"}, policy.Permissive, refused},
			{[]string{"istio"}, policy.Strict, refused},
			{nil, policy.Permissive, through},
			{nil, policy.Strict, refused},
		} {
			t.Run(fmt.Sprintf("%s, %q under %s", tls.VersionName(version), tt.alpn, tt.mode), func(t *testing.T) {
				k := start(t, withMode(tt.mode), withApp(oldApp(t)))
				conf := k.meshConfig(frontendID, tt.alpn...)
				conf.MinVersion, conf.MaxVersion = version, version
				conn := tls.Client(k.dial(), conf)
				err := conn.Handshake()
				if (err == nil) != (tt.want == through) {
					t.Errorf("%v, want %s", err, tt.want)
				}
				if err == nil {
					echoes(t, conn, "hello")
				}
				_ = conn.Close()
				line := k.next(nil)
				if tt.want == refused {
					k.app.untouched(t)
					if line["failure"] != refused {
						t.Errorf("%v", line)
					}
				}
			})
		}
	}
}

// oldApp is an app with TLS of every version.
func oldApp(t testing.TB) *app {
	k := newKit(t)
	conf := k.meshConfig(adminID)
	conf.MinVersion = tls.VersionTLS10
	return newApp(t, func(c *net.TCPConn) {
		conn := tls.Server(c, conf)
		if _, err := io.Copy(conn, conn); err != nil && !errors.Is(err, net.ErrClosed) {
			return
		}
		_ = conn.Close()
	})
}
