// Package measure reads what processes use, and condenses samples.
package measure

import (
	"bufio"
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CPU is the processor time, user's and kernel's, that processes have used since
// each began. It comes from their CPU clocks, which count nanoseconds.
func CPU(pids ...int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		var ts unix.Timespec
		// clock_getcpuclockid(3): the process's id inverted, over the kind of the clock.
		if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
			return 0, fmt.Errorf("reading the CPU clock of process %d: %w", pid, err)
		}
		sum += time.Duration(ts.Nano())
	}
	return sum, nil
}

// Own is the processor time that this process has used.
func Own() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		return 0 // never on Linux
	}
	return time.Duration(ts.Nano())
}

// Thread is the processor time of the calling thread, which the caller has locked.
func Thread() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// Memory is what of processes lies in memory, in bytes.
type Memory struct {
	Anonymous int64 // their own: heap, stacks
	File      int64 // pages of their programs, which the kernel can drop and shares
}

// Resident is the sum of both, the kernel's VmRSS.
func (m Memory) Resident() int64 { return m.Anonymous + m.File }

// MemoryOf reads the memory of processes.
func MemoryOf(pids ...int) (Memory, error) {
	var sum Memory
	for _, pid := range pids {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return sum, fmt.Errorf("reading the memory of process %d: %w", pid, err)
		}
		for line := range bytes.Lines(content) {
			name, rest, _ := strings.Cut(string(line), ":")
			if name != "RssAnon" && name != "RssFile" && name != "RssShmem" {
				continue
			}
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return sum, fmt.Errorf("reading the memory of process %d: %w", pid, err)
			}
			if name == "RssFile" {
				sum.File += kib << 10
			} else {
				sum.Anonymous += kib << 10
			}
		}
	}
	return sum, nil
}

// Family is a process with all that descend from it, as they are now.
func Family(pid int) ([]int, error) {
	parents := make(map[int][]int)
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		child, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child))
		if err != nil {
			continue // it has ended
		}
		// The name in parentheses may hold anything; the state and the parent follow.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		parent, err := strconv.Atoi(fields[1])
		if err != nil {
			return nil, fmt.Errorf("reading the parent of process %d: %w", child, err)
		}
		parents[parent] = append(parents[parent], child)
	}
	all := []int{pid}
	for i := 0; i < len(all); i++ {
		all = append(all, parents[all[i]]...)
	}
	return all, nil
}

// Latencies are samples of how long something took.
type Latencies []time.Duration

// Quantile is the smallest sample that a share of all (0 to 1) does not exceed; 0
// without samples. It sorts.
func (l Latencies) Quantile(share float64) time.Duration {
	if len(l) == 0 {
		return 0
	}
	slices.Sort(l)
	return l[max(0, int(math.Ceil(share*float64(len(l))))-1)]
}

// Milliseconds are those of a duration, with their fraction.
func Milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// OpenLoop calls begin at instants that are drawn, at a rate a second on average, as
// those of callers who know nothing of each other, until d is over or begin fails. Due
// is when a call should begin; it counts from then, however late it comes.
func OpenLoop(rate float64, d time.Duration, begin func(due time.Time) error) error {
	began := time.Now()
	due, timer := began, time.NewTimer(0)
	defer timer.Stop()
	for due.Sub(began) < d {
		due = due.Add(time.Duration(rand.ExpFloat64() / rate * float64(time.Second)))
		timer.Reset(time.Until(due))
		<-timer.C
		if err := begin(due); err != nil {
			return err
		}
	}
	return nil
}

// Median is the middle of some values; NaN without any.
func Median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	if n := len(sorted); n%2 == 0 {
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return sorted[len(sorted)/2]
}

// Machine says what this ran on, in one line.
func Machine() string {
	model := "an unknown processor"
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if name, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	var u unix.Utsname
	_ = unix.Uname(&u) // fails for a bad address only
	var info unix.Sysinfo_t
	_ = unix.Sysinfo(&info) // likewise
	var set unix.CPUSet
	_ = unix.SchedGetaffinity(0, &set) // likewise
	return fmt.Sprintf("%d × %s, %.0f GiB, Linux %s", set.Count(), model,
		float64(info.Totalram)*float64(info.Unit)/(1<<30), unix.ByteSliceToString(u.Release[:]))
}
