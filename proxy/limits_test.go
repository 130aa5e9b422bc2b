package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
)

// refusing is a Registerer that has had enough.
type refusing struct{ prometheus.Registerer }

func (refusing) Register(prometheus.Collector) error { return errors.New("no more") }

func contains(err error, text string) bool { return strings.Contains(err.Error(), text) }

// metric returns the value of a counter or gauge with these label values.
func (k *kit) metric(name string, labels ...string) float64 {
	k.t.Helper()
	families, err := k.registry.Gather()
	if err != nil {
		k.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			var values []string
			for _, l := range m.GetLabel() { // sorted by name
				values = append(values, l.GetValue())
			}
			if strings.Join(values, "|") == strings.Join(labels, "|") {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

func TestConnectionLimit(t *testing.T) {
	k := start(t, withMode(policy.Disable), with(func(c *Config) { c.MaxConnections = 2 }))
	first, second := k.dial(), k.dial()
	echoes(t, first, "hello")
	echoes(t, second, "hello")
	isLost(t, k.in, "hello")
	echoes(t, first, "hello")
	_ = second.Close()
	k.next(map[string]any{"end": "closed"})
	echoes(t, k.dial(), "hello")
	if n := k.metric("meshca_proxy_connections_total", "inbound", "limit", "none"); n != 1 {
		t.Errorf("%v were counted as refused", n)
	}
	if line := k.hears("connections are refused"); line["reason"] != errConnectionLimit.Error() {
		t.Errorf("%v", line)
	}
}

func TestHandshakesOfOneSourceAreLimited(t *testing.T) {
	k := start(t, with(func(c *Config) { c.MaxHandshakes = 3 }))
	conf := k.meshConfig(frontendID, "istio")
	for range 5 { // those that have proved who they are hold no slot
		echoes(t, k.dialTLS(conf), "hello")
	}
	var silent []net.Conn
	for range 3 {
		silent = append(silent, k.dial())
	}
	isLost(t, k.in, "") // once it is accepted, the three were
	if line := k.hears("connections are refused"); line["reason"] != errSourceLimit.Error() || line["peer"] != "127.0.0.1" {
		t.Errorf("%v", line)
	}
	elsewhere := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	other, err := elsewhere.Dial("tcp", k.in)
	if err != nil {
		t.Fatal(err)
	}
	_ = other.Close()
	k.next(map[string]any{"end": "closed", "security": "none"})
	for _, c := range silent {
		_ = c.Close()
		k.next(map[string]any{"end": "closed", "security": "none"})
	}
	echoes(t, k.dialTLS(conf), "hello")
}

// short is a listener that runs out of file descriptors for a while.
type short struct {
	net.Listener
	failures atomic.Int32
	err      error
}

func (s *short) Accept() (net.Conn, error) {
	if s.failures.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", s.err)}
	}
	return s.Listener.Accept()
}

func TestF24_AcceptSurvivesShortage(t *testing.T) {
	for _, err := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		t.Run(err.Error(), func(t *testing.T) {
			k := start(t, withMode(policy.Disable), with(func(c *Config) { c.Listen = shortly(c.Listen, 4, err) }))
			echoes(t, k.dial(), "hello")
			if n := k.metric("meshca_proxy_accept_failures_total"); n != 4 {
				t.Errorf("%v failures were counted", n)
			}
		})
	}
	t.Run("something else ends the proxy", func(t *testing.T) {
		k := newKit(t, with(func(c *Config) { c.Listen = shortly(c.Listen, 1, syscall.EINVAL) }))
		if err := k.proxy.Run(t.Context()); !errors.Is(err, syscall.EINVAL) {
			t.Error(err)
		}
	})
}

func shortly(listen func(string, string) (net.Listener, error), failures int32, err error) func(string, string) (net.Listener, error) {
	return func(network, address string) (net.Listener, error) {
		l, listenErr := listen(network, address)
		s := &short{Listener: l, err: err}
		s.failures.Store(failures)
		return s, listenErr
	}
}

// scarce is a dialler that finds the process out of descriptors for a while.
type scarce struct {
	failures atomic.Int32
	asked    atomic.Int32
	err      error
}

func (s *scarce) dial(ctx context.Context, network, address string) (net.Conn, error) {
	s.asked.Add(1)
	if s.failures.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("socket", s.err)}
	}
	return new(net.Dialer).DialContext(ctx, network, address)
}

func TestV34_F24_DialWaitsOutAShortage(t *testing.T) {
	for _, err := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM} {
		t.Run(err.Error(), func(t *testing.T) {
			few := &scarce{err: err}
			k := startTo(t, frontendID, func(ca *identitytest.CA) *app {
				return mtlsServer(t, ca, frontendID, make(chan []string, 2))
			}, withMode(policy.Disable), with(func(c *Config) { c.Dial = few.dial }))
			for _, address := range []string{k.in, k.out} {
				few.failures.Store(4)
				echoes(t, dialTCP(t, address), "hello")
			}
		})
	}
	t.Run("not for ever", func(t *testing.T) {
		few := &scarce{err: syscall.EMFILE}
		few.failures.Store(1 << 30)
		k := start(t, withMode(policy.Disable), with(func(c *Config) { c.Dial, c.DialTime = few.dial, 500*time.Millisecond }))
		ended(t, k.dial())
		line := k.next(map[string]any{"end": "unreachable"})
		if text, _ := line["error"].(string); !strings.Contains(text, syscall.EMFILE.Error()) {
			t.Errorf("the cause is lost: %v", line)
		}
		if few.asked.Load() < 2 {
			t.Error("it gave up at once")
		}
	})
	t.Run("another reason is final", func(t *testing.T) {
		few := &scarce{err: syscall.ECONNREFUSED}
		few.failures.Store(1 << 30)
		k := start(t, withMode(policy.Disable), with(func(c *Config) { c.Dial = few.dial }))
		ended(t, k.dial())
		k.next(map[string]any{"end": "unreachable"})
		if n := few.asked.Load(); n != 1 {
			t.Errorf("it was tried %d times", n)
		}
	})
}

// Who waits for a descriptor holds one: not all may.
func TestF24_NotAllWaitInAShortage(t *testing.T) {
	few := &scarce{err: syscall.EMFILE}
	few.failures.Store(1 << 30)
	k := start(t, withMode(policy.Disable), with(func(c *Config) { c.Dial, c.DialTime = few.dial, time.Minute }))
	var clients []net.Conn
	for range 12 {
		clients = append(clients, k.dial())
	}
	for range 8 { // at once
		k.next(map[string]any{"end": "unreachable"})
	}
	few.failures.Store(0)
	served := 0
	for _, conn := range clients {
		if tryEcho(conn, "hello") == nil {
			served++
		}
	}
	if served != 4 {
		t.Errorf("%d waited and were served, want 4", served)
	}
}

// childEnv tells this test's binary to be a proxy with few file descriptors, in
// front of the app at that address.
const childEnv = "MESHCA_TEST_PROXY_CHILD"

// TestF24_Child is the other process of the test below.
func TestF24_Child(t *testing.T) {
	app := os.Getenv(childEnv)
	if app == "" {
		return
	}
	k := newKit(t)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 64, Max: 64}); err != nil {
		t.Fatal(err)
	}
	p, err := New(Config{
		Inbound:  []Inbound{{Listen: "127.0.0.1:0", App: app}},
		Identity: k.world, Policy: &rules{mode: policy.Disable, changed: make(chan struct{})},
		Now: time.Now, Metrics: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler),
		Listen: func(network, address string) (net.Listener, error) {
			l, err := net.Listen(network, address)
			if err == nil {
				fmt.Printf("listening %s\n", l.Addr())
			}
			return l, err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { // the parent closes our input
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	if err := p.Run(ctx); err != nil {
		t.Error(err)
	}
}

// openFiles returns what the descriptors of a process stand for.
func openFiles(t testing.TB, pid int) []string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Skipf("the descriptors of a process cannot be counted here: %v", err)
	}
	var open []string
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			open = append(open, to)
		}
	}
	return open
}

func countSockets(t testing.TB) int {
	t.Helper()
	return len(slices.DeleteFunc(openFiles(t, os.Getpid()), func(to string) bool { return !strings.HasPrefix(to, "socket:") }))
}

// serves opens a connection to an echo and uses it.
func serves(address string) error {
	conn, err := net.DialTimeout("tcp", address, 2*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	return tryEcho(conn, "hello")
}

// eventually waits until something that nobody tells of has come about.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("it has not come about within 20 s")
		}
	}
}

// What plaintext was spliced through is held when its connection is gone, and
// given back when descriptors are wanting.
func TestF24_ShortageFreesIdlePipes(t *testing.T) {
	few := &scarce{err: syscall.EMFILE}
	k := start(t, withMode(policy.Disable), with(func(c *Config) { c.Dial = few.dial }))
	pipes := func() int {
		return len(slices.DeleteFunc(openFiles(t, os.Getpid()), func(to string) bool { return !strings.HasPrefix(to, "pipe:") }))
	}
	before := pipes()
	for range 10 {
		echoes(t, k.dial(), "hello")
	}
	if pipes() < before+20 {
		t.Skip("bytes are not spliced here")
	}
	k.proxy.eachLive(func(c *connection) { c.cut(endDrain, nil) })
	for range 10 {
		k.next(nil)
	}
	few.failures.Store(1)
	conn := k.dial()
	echoes(t, conn, "hello")
	eventually(t, func() bool { return pipes() <= before+4 })
}

func TestV34_F24_ProcessOutlivesItsFileDescriptors(t *testing.T) {
	app := newApp(t, echo)
	child := exec.Command(os.Args[0], "-test.run=^TestF24_Child$")
	child.Env = append(os.Environ(), childEnv+"="+app.address)
	input, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var address string
	if _, err := fmt.Fscanf(output, "listening %s\n", &address); err != nil {
		t.Fatalf("the child says nothing: %v", err)
	}
	first := dialTCP(t, address)
	echoes(t, first, "hello")
	held := []net.Conn{first}
	for range 99 {
		conn, err := net.Dial("tcp", address) // at the latest the kernel's queue takes it
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, conn)
	}
	// Until the child has no descriptor left.
	eventually(t, func() bool { return len(openFiles(t, child.Process.Pid)) >= 62 })
	echoes(t, first, "hello") // who is served goes on being served
	for _, c := range held {
		_ = c.Close()
	}
	// Whoever waited in the kernel's queue comes first, and some of those end the
	// shortage and others prolong it. When two seconds are over all is as before.
	released := time.Now()
	failed, inARow := 0, 0
	for inARow < 20 {
		if inARow++; serves(address) != nil {
			failed, inARow = failed+1, 0
		}
		if late := time.Since(released); late > 2*time.Second {
			t.Fatalf("%v after the release only %d connections in a row were served, and %d were not", late, inARow, failed)
		}
	}
	t.Logf("20 connections in a row were served within %v of the release; %d before them were not", time.Since(released), failed)
	_ = input.Close()
	_, _ = io.Copy(io.Discard, output)
	if err := child.Wait(); err != nil {
		t.Errorf("the child: %v", err)
	}
}

// Whoever says nothing, or nonsense, is sent away while others are served.
func TestF57_SilentAndGarbagePeersAreReaped(t *testing.T) {
	k := start(t, with(func(c *Config) { c.HandshakeTime = 300 * time.Millisecond }))
	var bad []net.Conn
	for i := range 60 {
		conn := k.dial()
		if i >= 40 {
			_, _ = conn.Write(random(100)[:1+i])
		}
		bad = append(bad, conn)
	}
	conf := k.meshConfig(frontendID, "istio")
	for range 20 {
		conn := k.dialTLS(conf)
		echoes(t, conn, "hello")
		_ = conn.Close()
	}
	for _, conn := range bad {
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a bad peer was not sent away")
		}
	}
	ends := map[any]int{}
	for range 80 {
		ends[k.next(nil)["end"]]++
	}
	if ends["closed"] != 20 || ends["handshake failed"] != 40 || ends["refused"] != 20 {
		t.Errorf("%v", ends)
	}
}

func TestF57_ResetDuringTheHandshake(t *testing.T) {
	k := start(t)
	hello := recordHello(k.meshConfig(frontendID, "istio"))
	for i := range 40 {
		conn := k.dial()
		_, _ = conn.Write(hello[:len(hello)-i%2])
		reset(conn)
		k.next(map[string]any{"end": "handshake failed"})
	}
	echoes(t, k.dialTLS(k.meshConfig(frontendID, "istio")), "hello")
}

// Six hundred connections of all kinds leave nothing behind: no goroutine, no
// descriptor.
func TestV4_F57_ChurnLeavesNothingBehind(t *testing.T) {
	// The collector would close what we forgot to.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	churn(t, 100)
}

// churn opens so many connections by each of six workers.
func churn(t *testing.T, each int) {
	k := start(t, withMode(policy.Permissive), with(impatient), withOutbound("127.0.0.1:1", adminID))
	for _, address := range []string{k.in, k.out} { // until all that stays is there
		if conn, err := net.Dial("tcp", address); err == nil {
			_ = conn.Close()
		}
		k.next(nil)
	}
	before, sockets := goleak.IgnoreCurrent(), countSockets(t)
	conf := k.meshConfig(frontendID, "istio")
	var clients sync.WaitGroup
	for worker := range 6 {
		clients.Go(func() {
			for i := range each {
				switch (worker + i) % 4 {
				case 0:
					conn, err := tls.Dial("tcp", k.in, conf)
					if err != nil {
						t.Error(err)
						return
					}
					echoes(t, conn, "hello")
					_ = conn.Close()
				case 1:
					if err := serves(k.in); err != nil {
						t.Error(err)
					}
				case 2:
					if conn, err := net.Dial("tcp", k.in); err == nil {
						reset(conn)
					}
				case 3:
					if conn, err := net.Dial("tcp", k.out); err == nil {
						_ = conn.Close()
					}
				}
			}
		})
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for n := range 6 * each {
			if k.next(nil); n%10_000 == 9_999 {
				t.Logf("%d connections have ended", n+1)
			}
		}
	}()
	clients.Wait()
	<-ended
	for len(k.app.conns) > 0 {
		<-k.app.conns
	}
	eventually(t, func() bool { return countSockets(t) <= sockets })
	if err := goleak.Find(before); err != nil {
		t.Error(err)
	}
	k.proxy.mu.Lock()
	defer k.proxy.mu.Unlock()
	if len(k.proxy.live) != 0 || len(k.proxy.handshakes) != 0 {
		t.Errorf("%d connections and %d slots are left", len(k.proxy.live), len(k.proxy.handshakes))
	}
}
