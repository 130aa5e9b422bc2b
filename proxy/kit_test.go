package proxy

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	cartID     = "spiffe://example.org/ns/shop/sa/cart" // the proxy
	frontendID = "spiffe://example.org/ns/shop/sa/frontend"
	adminID    = "spiffe://example.org/ns/shop/sa/admin"
)

// world is an Identity that a test changes.
type world struct {
	mu      sync.Mutex
	svid    *identity.SVID
	bundle  *identity.Bundle
	changed chan struct{}
}

func (w *world) SVID() (*identity.SVID, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.svid.SVID()
}

func (w *world) Bundle(td identity.TrustDomain) (*identity.Bundle, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bundle.Bundle(td)
}

func (w *world) Changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func (w *world) set(svid *identity.SVID, bundle *identity.Bundle) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.svid, w.bundle = svid, bundle
	close(w.changed)
	w.changed = make(chan struct{})
}

// rules are a Policy that a test changes.
type rules struct {
	mu      sync.Mutex
	mode    policy.Mode
	err     error
	changed chan struct{}
}

func (r *rules) Decide(uint16) (Decision, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Decision{Mode: r.mode, Source: "shop/" + r.mode.String()}, r.err
}

func (r *rules) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

func (r *rules) set(mode policy.Mode, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mode, r.err = mode, err
	close(r.changed)
	r.changed = make(chan struct{})
}

// kit is a running proxy in front of an app.
type kit struct {
	t        testing.TB
	ca       *identitytest.CA
	world    *world
	rules    *rules
	app      *app
	in, out  string // where the listeners are; out is for a proxy with an Outbound
	proxy    *Proxy
	registry *prometheus.Registry
	lines    chan map[string]any // of the access log
	logged   chan map[string]any // everything else
	stop     func()
}

// options of start.
type option func(*kit, *Config)

func withMode(m policy.Mode) option { return func(k *kit, _ *Config) { k.rules.mode = m } }

func withApp(a *app) option { return func(k *kit, _ *Config) { k.app = a } }

func with(f func(*Config)) option { return func(_ *kit, c *Config) { f(c) } }

// withOutbound adds an outbound listener to target.
func withOutbound(target, id string) option {
	return func(k *kit, c *Config) {
		c.Outbound = []Outbound{{Listen: k.out, Target: target, Peer: identitytest.ID(k.t, id)}}
	}
}

// start runs a proxy until the test ends. Detection does not give up on clients
// unless a test says otherwise: a machine may be slow.
func start(t testing.TB, opts ...option) *kit {
	t.Helper()
	k := newKit(t, opts...)
	k.run()
	return k
}

func newKit(t testing.TB, opts ...option) *kit {
	t.Helper()
	ca := identitytest.NewCA(t, identitytest.TrustDomain(t, "example.org"))
	k := &kit{
		t: t, ca: ca, registry: prometheus.NewRegistry(),
		world: &world{changed: make(chan struct{}), svid: ca.SVID(t, identitytest.ID(t, cartID)), bundle: ca.Bundle()},
		rules: &rules{changed: make(chan struct{})},
		lines: make(chan map[string]any, 4096), logged: make(chan map[string]any, 4096),
	}
	listeners := make(map[string]net.Listener)
	for _, address := range []*string{&k.in, &k.out} {
		l := listenLocal(t)
		*address = l.Addr().String()
		listeners[*address] = l
		t.Cleanup(func() { _ = l.Close() })
	}
	conf := Config{
		Identity: k.world, Policy: k.rules, Now: time.Now, Metrics: k.registry, Log: slog.New(slog.NewJSONHandler(k, nil)),
		DetectionTime: time.Minute, DrainTime: time.Minute,
		Listen: func(_, address string) (net.Listener, error) { return listeners[address], nil },
	}
	for _, o := range opts {
		o(k, &conf)
	}
	if k.app == nil {
		k.app = newApp(t, echo)
	}
	conf.Inbound = []Inbound{{Listen: k.in, App: k.app.address}}
	var err error
	if k.proxy, err = New(conf); err != nil {
		t.Fatal(err)
	}
	return k
}

// run starts the proxy and sees to its end.
func (k *kit) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- k.proxy.Run(ctx) }()
	k.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			k.t.Errorf("Run: %v", err)
		}
	})
	k.t.Cleanup(func() {
		// Connections that a test left open end with it.
		k.proxy.eachLive(func(c *connection) { c.cut(endDrain, nil) })
		k.stop()
	})
}

// Write takes a line of the log.
func (k *kit) Write(p []byte) (int, error) {
	line := make(map[string]any)
	if err := json.Unmarshal(p, &line); err != nil {
		k.t.Errorf("log line %q: %v", p, err)
	}
	to := k.logged
	if line["msg"] == "connection" {
		to = k.lines
	}
	select {
	case to <- line:
	default: // a benchmark reads none
	}
	return len(p), nil
}

// next returns the next line of the access log, and holds what it says.
func (k *kit) next(want map[string]any) map[string]any {
	k.t.Helper()
	select {
	case line := <-k.lines:
		for key, value := range want {
			if line[key] != value {
				k.t.Errorf("access log: %s is %v, want %v; the line: %v", key, line[key], value, line)
			}
		}
		return line
	case <-time.After(20 * time.Second):
		k.t.Fatal("no line in the access log")
		return nil
	}
}

// hears waits for a log line with that message.
func (k *kit) hears(msg string) map[string]any {
	k.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case line := <-k.logged:
			if line["msg"] == msg {
				return line
			}
		case <-timeout:
			k.t.Fatalf("the log never said %q", msg)
		}
	}
}

// dial opens a TCP connection to the inbound listener.
func (k *kit) dial() *net.TCPConn { return dialTCP(k.t, k.in) }

func dialTCP(t testing.TB, address string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	// What hangs fails.
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// meshConfig is a client of the mesh, built without our client side: plain
// crypto/tls with a certificate.
func (k *kit) meshConfig(id string, alpn ...string) *tls.Config {
	k.t.Helper()
	return configOf(k.ca.SVID(k.t, identitytest.ID(k.t, id)), alpn...)
}

func configOf(svid *identity.SVID, alpn ...string) *tls.Config {
	certificate := tls.Certificate{PrivateKey: svid.PrivateKey()}
	for _, c := range svid.Certificates() {
		certificate.Certificate = append(certificate.Certificate, c.Raw)
	}
	return &tls.Config{
		InsecureSkipVerify: true, //nolint:gosec // tests look at the server's certificate where it matters
		Certificates:       []tls.Certificate{certificate}, NextProtos: alpn,
	}
}

// dialTLS opens a connection and handshakes. In TLS 1.3 a refusal comes with the
// first read.
func (k *kit) dialTLS(conf *tls.Config) *tls.Conn {
	k.t.Helper()
	conn := tls.Client(k.dial(), conf)
	if err := conn.Handshake(); err != nil {
		k.t.Fatal(err)
	}
	return conn
}

// echoes sends text and wants it back.
func echoes(t testing.TB, conn io.ReadWriter, text string) {
	t.Helper()
	if err := tryEcho(conn, text); err != nil {
		t.Errorf("echo: %v", err)
	}
}

func tryEcho(conn io.ReadWriter, text string) error {
	if _, err := io.WriteString(conn, text); err != nil {
		return err
	}
	back := make([]byte, len(text))
	if _, err := io.ReadFull(conn, back); err != nil {
		return err
	}
	if string(back) != text {
		return errors.New("it came back as " + string(back))
	}
	return nil
}

// ended wants the connection to end without another byte.
func ended(t testing.TB, conn io.Reader) {
	t.Helper()
	n, err := io.Copy(io.Discard, conn)
	if n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes came, then %v; want the end", n, err)
	}
}

// app is a server on loopback that tells of each connection.
type app struct {
	address string
	conns   chan *net.TCPConn // as they are accepted
}

// newApp serves each connection with handle until the test ends.
func newApp(t testing.TB, handle func(*net.TCPConn)) *app {
	t.Helper()
	l := listenLocal(t)
	a := &app{address: l.Addr().String(), conns: make(chan *net.TCPConn, 4096)}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			select {
			case a.conns <- conn.(*net.TCPConn):
			default:
			}
			all.Go(func() {
				defer conn.Close()
				handle(conn.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		all.Wait()
	})
	return a
}

func listenLocal(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// accepted waits for the next connection that the app accepts.
func (a *app) accepted(t testing.TB) *net.TCPConn {
	t.Helper()
	select {
	case c := <-a.conns:
		return c
	case <-time.After(20 * time.Second):
		t.Fatal("the app was not dialled")
		return nil
	}
}

// untouched holds that nothing reached the app.
func (a *app) untouched(t testing.TB) {
	t.Helper()
	select {
	case c := <-a.conns:
		t.Errorf("the app was dialled, by %s", c.RemoteAddr())
	default:
	}
}

// echo sends everything back, and ends when the client does.
func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

const greeting = "220 mail.shop ESMTP ready\r\n"

// greet speaks first, as MySQL and SMTP do, and then echoes.
func greet(c *net.TCPConn) {
	if _, err := io.WriteString(c, greeting); err == nil {
		echo(c)
	}
}

// isReset reports whether err is what a reset connection yields: once the one,
// from then on the other.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// tlsEcho is an echo over TLS, with the next of the configurations.
func tlsEcho(confs <-chan *tls.Config) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		conn := tls.Server(c, <-confs)
		_, _ = io.Copy(conn, conn)
		_ = conn.Close()
	}
}
