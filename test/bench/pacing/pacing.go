// Package pacing shows how the renewals of a fleet that started together spread.
package pacing

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/bench/table"
)

// Title and Method head the part's section.
const (
	Title  = "Pacing"
	Method = `Computed, not measured: 10,000 pods get their first certificate within the same 30 s, and each renews when our agent's own
rule says (the function that the agent calls, with draws from a fixed seed), for six lifetimes. Beside it is a client that renews at half
of the lifetime ± 1 %, as Istio's agents do by default. Lifetime is 1 h, a bar is a minute. The CA asks nobody to come at another time: the
draw alone has the fleet apart within a few renewals, whichever replica answers, and a busy CA says when to come back.`
)

const (
	pods     = 10_000
	lifetime = time.Hour
	hours    = 6
)

// Run computes into p.
func Run(_ context.Context, r *rig.Run, p *table.Part) error {
	for round := range r.Rounds {
		ours := renewals(uint64(round), agent.RenewDelay)
		theirs := renewals(uint64(round), func(lifetime time.Duration, draw float64) time.Duration {
			return time.Duration(float64(lifetime) * (0.5 + 0.01*(2*draw-1)))
		})
		for _, of := range []struct {
			name    string
			minutes []float64
		}{{"meshca's agent", ours}, {"half of the lifetime ± 1 %", theirs}} {
			for _, hour := range []int{1, 2, 6} {
				in := of.minutes[60*(hour-1) : 60*hour]
				f := p.Add(fmt.Sprintf("busiest minute of hour %d, as a multiple of the mean", hour), of.name, "×", slices.Max(in)/mean(in))
				if hour == 6 && of.name == "meshca's agent" {
					f.Goal = table.AtMost(1.3)
				}
			}
		}
		if round == 0 {
			p.Series = append(p.Series, histogram("pacing-ours", "Renewals of 10,000 pods, each minute: meshca's agent", ours),
				histogram("pacing-half-life", "Renewals of 10,000 pods, each minute: at half of the lifetime ± 1 %", theirs))
		}
	}
	slices.SortStableFunc(p.Figures, func(a, b *table.Figure) int { return strings.Compare(a.Group, b.Group) })
	return nil
}

// renewals counts them by minute.
func renewals(seed uint64, delay func(time.Duration, float64) time.Duration) []float64 {
	draws := rand.New(rand.NewPCG(seed, 1))
	minutes := make([]float64, 60*hours)
	for range pods {
		at := time.Duration(draws.Float64() * float64(30*time.Second))
		for {
			at += delay(lifetime, draws.Float64())
			if at >= hours*time.Hour {
				break
			}
			minutes[at/time.Minute]++
		}
	}
	return minutes
}

func mean(values []float64) float64 {
	sum := 0.0
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}

func histogram(name, title string, minutes []float64) table.Series {
	line := table.Line{Name: "renewals"}
	for i, v := range minutes {
		line.X, line.Y = append(line.X, float64(i)), append(line.Y, v)
	}
	return table.Series{Name: name, Title: title, X: "minutes after the start", Y: "renewals a minute", Bars: true, Lines: []table.Line{line}}
}
