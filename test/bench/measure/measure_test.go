package measure

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	l := Latencies{5, 1, 4, 2, 3}
	for share, want := range map[float64]time.Duration{0: 1, 0.2: 1, 0.21: 2, 0.5: 3, 0.99: 5, 1: 5} {
		if got := l.Quantile(share); got != want {
			t.Errorf("%v: %v, want %v", share, got, want)
		}
	}
	if got := (Latencies{}).Quantile(0.5); got != 0 {
		t.Errorf("of nothing: %v", got)
	}
}

func TestMedian(t *testing.T) {
	if got := Median([]float64{3, 1, 2}); got != 2 {
		t.Error(got)
	}
	if got := Median([]float64{4, 1, 2, 3}); got != 2.5 {
		t.Error(got)
	}
}

// A process that only waits uses next to nothing; this one, counting, uses all.
func TestCPU(t *testing.T) {
	before, err := CPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for own := Own(); Own()-own < 50*time.Millisecond; {
	}
	after, err := CPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if after-before < 50*time.Millisecond {
		t.Errorf("%v used, want at least 50ms", after-before)
	}
	if _, err := CPU(1 << 22); err == nil {
		t.Error("a process that is not there has a clock")
	}
}

func TestFamilyAndMemory(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	family, err := Family(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if len(family) < 2 || family[0] != os.Getpid() {
		t.Fatalf("family %v lacks the child %d", family, cmd.Process.Pid)
	}
	m, err := MemoryOf(family...)
	if err != nil || m.Anonymous < 1<<20 || m.File < 1<<20 {
		t.Errorf("%+v, %v", m, err)
	}
}
