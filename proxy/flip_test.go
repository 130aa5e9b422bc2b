package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
)

// The policy changes all the time; what is open is always what one of its
// versions allows, and mutual TLS never notices.
func TestT10_PolicyFlapping(t *testing.T) {
	k := start(t)
	mesh := k.dialTLS(configOf(k.ca.SVID(t, identitytest.ID(t, frontendID)), "istio"))
	for i := range 200 {
		mode := []policy.Mode{policy.Strict, policy.Permissive}[i%2]
		k.rules.set(mode, nil)
		echoes(t, mesh, "hello")
		conn := k.dial()
		err := tryEcho(conn, "hello")
		if (err == nil) != (mode == policy.Permissive) {
			t.Errorf("%s: %v", mode, err)
		}
		_ = conn.Close()
	}
}

// flips is a Policy whose versions are numbered: odd ones are STRICT.
type flips struct {
	mu      sync.Mutex
	version int
	since   []time.Time // of each version
	changed chan struct{}
}

func newFlips() *flips { return &flips{since: []time.Time{time.Now()}, changed: make(chan struct{})} }

func modeOf(version int) policy.Mode {
	return []policy.Mode{policy.Permissive, policy.Strict}[version%2]
}

func (f *flips) Decide(uint16) (Decision, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return Decision{Mode: modeOf(f.version), Source: fmt.Sprintf("version %d", f.version)}, nil
}

func (f *flips) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *flips) flip() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version++
	f.since = append(f.since, time.Now())
	close(f.changed)
	f.changed = make(chan struct{})
}

func TestF61_EachConnectionIsJudgedByOneVersion(t *testing.T) { flipping(t, 1200*time.Millisecond) }

// flipping changes the policy every 50 ms while clients of all kinds come and go.
func flipping(t *testing.T, long time.Duration) {
	versions := newFlips()
	k := start(t, with(func(c *Config) { c.Policy, c.DetectionTime = versions, 300*time.Millisecond }))
	conf := k.meshConfig(frontendID, "istio")
	stop := make(chan struct{})
	var clients sync.WaitGroup
	var mesh, plain atomic.Int64
	until := func(f func()) {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					f()
				}
			}
		})
	}
	held := k.dialTLS(conf) // through all versions
	if err := held.SetDeadline(time.Now().Add(long + 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	until(func() { // comes and goes
		conn := k.dialTLS(conf)
		echoes(t, conn, "hello")
		_ = conn.Close()
		mesh.Add(1)
	})
	for _, greets := range []bool{true, false} { // plaintext for as long as it is let, at once or late
		until(func() {
			conn, err := net.Dial("tcp", k.in)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			if !greets {
				_ = conn.SetReadDeadline(time.Now().Add(400 * time.Millisecond))
				if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
					return // a flip ended it
				}
				_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			}
			for tryEcho(conn, "hello") == nil {
				plain.Add(1)
			}
		})
	}
	judged := make(chan struct{})
	go func() {
		defer close(judged)
		for line := range k.lines {
			if line["end"] == nil {
				return
			}
			versions.judge(t, line)
		}
	}()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); time.Since(began) < long; {
		<-tick.C
		versions.flip()
		echoes(t, held, "hello")
		if n := len(versions.since); n%100 == 0 {
			t.Logf("version %d: %d connections of the mesh, %d echoes of plaintext", n, mesh.Load(), plain.Load())
		}
	}
	close(stop)
	// The last flip, which ends what plaintext there is.
	for modeOf(versions.version) != policy.Strict {
		versions.flip()
	}
	clients.Wait()
	_ = held.Close()
	k.stop()
	k.lines <- map[string]any{}
	<-judged
	if mesh.Load() == 0 || plain.Load() == 0 {
		t.Errorf("%d connections of the mesh and %d echoes of plaintext prove nothing", mesh.Load(), plain.Load())
	}
}

// judge holds a line of the access log against the one version that it names.
func (f *flips) judge(t *testing.T, line map[string]any) {
	t.Helper()
	var version int
	if _, err := fmt.Sscanf(line["policy"].(string), "version %d", &version); err != nil {
		t.Errorf("%v: %v", err, line)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	mode := modeOf(version)
	ended, err := time.Parse(time.RFC3339Nano, line["time"].(string))
	if err != nil || line["mode"] != mode.String() {
		t.Errorf("version %d is %s: %v, %v", version, mode, line, err)
	}
	carried := line["bytes_to_app"].(float64) > 0
	switch line["end"] {
	case "policy": // cut by this version
		if mode != policy.Strict || line["security"] == "mutual TLS" {
			t.Errorf("cut under %s: %v", mode, line)
		}
		if late := ended.Sub(f.since[version]); late > time.Second {
			t.Errorf("it ended %v after version %d: %v", late, version, line)
		}
	case "refused":
		if mode != policy.Strict || carried {
			t.Errorf("%v", line)
		}
	default: // as it was admitted
		if mode == policy.Strict && carried && line["security"] != "mutual TLS" {
			t.Errorf("plaintext was carried under STRICT: %v", line)
		}
		// Open plaintext outlives the next version, which is STRICT, by no second.
		if line["security"] == "plaintext" && carried && version+1 < len(f.since) && ended.Sub(f.since[version+1]) > time.Second {
			t.Errorf("it outlived version %d: %v", version+1, line)
		}
	}
}

// A handshake of the mesh that is under way when the policy becomes STRICT is
// what STRICT wants.
func TestF61_HandshakeOutlivesAFlip(t *testing.T) {
	k := start(t, withMode(policy.Permissive))
	slow := &firstByteApart{Conn: k.dial(), between: func() {
		k.rules.set(policy.Strict, nil)
		refused := k.dial() // judged after the flip, so the other was judged as well
		_, _ = io.WriteString(refused, "hello")
		ended(t, refused)
		k.next(map[string]any{"end": "refused", "mode": "STRICT"})
	}}
	conn := tls.Client(slow, k.meshConfig(frontendID, "istio"))
	echoes(t, conn, "hello")
	_ = conn.Close()
	k.next(map[string]any{"end": "closed", "security": "mutual TLS", "mode": "PERMISSIVE"})
}

// In-flight connections under load end in their own time, or with the drain's;
// whoever comes later finds nobody.
func TestF59_DrainUnderLoad(t *testing.T) {
	k := start(t, with(func(c *Config) { c.DrainTime = 1500 * time.Millisecond }))
	conf := k.meshConfig(frontendID, "istio")
	const clients = 40
	draining := make(chan struct{})
	var busy, ready sync.WaitGroup
	var lasting []net.Conn
	for i := range clients {
		conn := k.dialTLS(conf)
		if i%8 == 0 { // never ends by itself
			echoes(t, conn, "hello")
			lasting = append(lasting, conn)
			continue
		}
		ready.Add(1)
		busy.Go(func() {
			text := string(random(16 << 10))
			echoes(t, conn, text)
			ready.Done()
			<-draining
			for range 10 {
				echoes(t, conn, text)
			}
			if err := conn.CloseWrite(); err != nil {
				t.Error(err)
			}
			if rest, err := io.ReadAll(conn); err != nil || len(rest) != 0 {
				t.Errorf("at the end: %d bytes, %v", len(rest), err)
			}
		})
	}
	ready.Wait()
	began, stopped := time.Now(), make(chan struct{})
	go func() { k.stop(); close(stopped) }()
	eventually(t, func() bool { return k.proxy.Ready() != nil && strings.Contains(k.proxy.Ready().Error(), "draining") })
	if conn, err := net.Dial("tcp", k.in); err == nil {
		t.Error("a connection was accepted during the drain")
		_ = conn.Close()
	}
	close(draining)
	busy.Wait()
	for _, conn := range lasting { // those that have not ended go on until the end
		echoes(t, conn, "hello")
	}
	<-stopped
	if took := time.Since(began); took < 1500*time.Millisecond || took > 10*time.Second {
		t.Errorf("the drain took %v", took)
	}
	for _, conn := range lasting {
		if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("one that outlasts the drain sees %v", err)
		}
	}
	ends := map[any]int{}
	for range clients {
		ends[k.next(nil)["end"]]++
	}
	if ends["closed"] != clients-len(lasting) || ends["drain"] != len(lasting) {
		t.Errorf("%v", ends)
	}
}
