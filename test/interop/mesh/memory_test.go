package mesh

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

// TestIdleMemory: our programs, for a minute after they have begun to serve and
// with nobody asking for anything, stay within what we promise.
func TestIdleMemory(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	m := newMesh(t, 0)
	m.serveArgs = append(m.serveArgs, "--policy-dir", m.policies(t, "policies").dir)
	ca := m.startCA(t)
	a := m.workload(t, "cart").startReadyAgent(t, ca)
	proxy := a.startProxy(t, backend(t))
	minute := time.NewTimer(time.Minute)
	defer minute.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	most := make(map[string]uint64)
	for over := false; !over; {
		select {
		case <-minute.C:
			over = true
		case <-tick.C:
		}
		for _, p := range []*program{&ca.program, &a.program, &proxy.program} {
			resident, err := residentBytes(p.process.PID())
			if err != nil {
				t.Fatal(err)
			}
			most[p.binary] = max(most[p.binary], resident)
			if over {
				t.Logf("%s: %.1f MiB resident after a minute, %.1f MiB at most", p.name, float64(resident)/mib, float64(most[p.binary])/mib)
			}
		}
	}
	if underRaceDetector() {
		t.Log("the race detector takes several times as much; nothing to hold that against")
		return
	}
	if got := most[ca.binary]; got > 40*mib {
		t.Errorf("meshca had %d bytes resident, want at most 40 MiB", got)
	}
	if got := most[a.binary]; got > 30*mib {
		t.Errorf("agent had %d bytes resident, want at most 30 MiB", got)
	}
	if got := most[proxy.binary]; got > 20*mib {
		t.Errorf("proxy had %d bytes resident, want at most 20 MiB", got)
	}
}

// residentBytes is the kernel's VmRSS.
func residentBytes(pid int) (uint64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(content) {
		if rest, ok := bytes.CutPrefix(line, []byte("VmRSS:")); ok {
			kib, err := strconv.ParseUint(string(bytes.TrimSpace(bytes.TrimSuffix(bytes.TrimSpace(rest), []byte("kB")))), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("process %d has no VmRSS", pid)
}
