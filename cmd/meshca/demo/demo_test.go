package demo_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/cmd/meshca/demo"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The demo is one more judge of what it shows: with a protection switched off it
// has to say that a step did not hold, and exit with 1.
func TestT1_T10_V22_V45_EveryStepHolds(t *testing.T) {
	t.Setenv("LC_ALL", "C.UTF-8")
	var out, errs, log bytes.Buffer // progress and the log are written at the same time
	report, err := demo.Run(t.Context(), demo.Config{Out: &out, Err: &errs, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatalf("%v\n%s%s", err, errs.String(), log.String())
	}
	if !report.Held || len(report.Steps) != 9 {
		t.Errorf("not every step held:\n%s\n%s", out.String(), log.String())
	}
	for _, want := range []string{
		`audience ["vault"] does not hold "meshca"`,
		`asks for the identity "spiffe://cluster.local/ns/shop/sa/admin"`,
		"0 of ", "namespace shop/default says STRICT", "9 of 9 held",
	} {
		// Reasons are wrapped; a line break is as good as a space.
		if text := strings.Join(strings.Fields(out.String()), " "); !strings.Contains(text, want) {
			t.Errorf("the output does not say %q:\n%s", want, out.String())
		}
	}
	for line := range strings.SplitSeq(out.String(), "\n") {
		if n := len([]rune(line)); n > 100 {
			t.Errorf("a line has %d columns: %q", n, line)
		}
	}
}
