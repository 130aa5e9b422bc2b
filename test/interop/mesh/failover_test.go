package mesh

import (
	"fmt"
	"syscall"
	"testing"
	"time"
)

// middlingLife leaves, after half of it, more than the 5 s that the agent gives
// a CA that says nothing.
const middlingLife = 14 * time.Second

// TestF34_F15_ReplicasDieHangAndComeBack: two CAs on one root, and an agent that
// knows both.
func TestF34_F15_ReplicasDieHangAndComeBack(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	m := newMesh(t, middlingLife)
	first, second := m.startCA(t), m.startCA(t)
	a := m.workload(t, "cart").startReadyAgent(t, first, second)
	svids := source(t, a)

	// It dies: connections are reset, new ones refused.
	wantRenewalFrom(t, a, first)
	first.Kill9(t)
	wantRenewalFrom(t, a, second)

	// It hangs: the kernel accepts, nobody answers.
	first.Restart(t)
	resume := hang(t, second)
	wantRenewalFrom(t, a, first)
	resume()

	// Both die: the agent serves what it has, says for how long, and heals.
	first.Kill9(t)
	second.Kill9(t)
	failed, err := a.waitLine(ctx, "until when it serves", stillServing)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(failed.text("msg"))
	if err := waitReady(ctx, "the agent without a CA", a.ops); err != nil {
		t.Error(err)
	}
	svid, err := svids.GetX509SVID()
	if err != nil || !svid.Certificates[0].NotAfter.After(time.Now()) {
		t.Errorf("a program without a CA has an SVID that ended at %s (%v)", svid.Certificates[0].NotAfter, err)
	}
	have := a.count(t, obtained)
	first.Restart(t)
	up := time.Now()
	second.Restart(t)
	waitNewer(t, a, have)
	took := time.Since(up)
	t.Logf("a certificate was issued %s after the first of two CAs was up again", took.Round(time.Millisecond))
	if took > 5*time.Second {
		t.Errorf("a certificate was issued %s after the first CA was up again, want at most 5 s", took)
	}
}

// hang stops a CA's process until resume, or the end of the test.
func hang(t *testing.T, ca *CA) (resume func()) {
	t.Helper()
	if err := ca.process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume = func() {
		if err := ca.process.Signal(syscall.SIGCONT); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(resume) // before the cleanup that waits for its end
	return resume
}

// waitNewer returns the line about the certificate that followed the first n.
func waitNewer(t *testing.T, a *Agent, n int) logLine {
	t.Helper()
	var newer logLine
	err := eventually(t.Context(), fmt.Sprintf("certificate %d", n+1), func() error {
		lines, err := a.matching(obtained)
		if err != nil {
			return err
		}
		if len(lines) <= n {
			return fmt.Errorf("there are %d; the agent's log:\n%s", len(lines), a.process.LogTail(5))
		}
		newer = lines[n]
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return newer
}

// wantRenewalFrom waits for the next certificate and wants it to be of that CA.
func wantRenewalFrom(t *testing.T, a *Agent, from *CA) {
	t.Helper()
	line := waitNewer(t, a, a.count(t, obtained))
	if line.text("ca") != from.address {
		t.Errorf("the next certificate came from %q, want %q", line.text("ca"), from.address)
	}
}
