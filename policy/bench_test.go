package policy_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/meshca/meshca/policy"
)

// fleet is ten thousand policies and as many workloads, in as many namespaces as
// are asked for.
func fleet(namespaces int) (policies []policy.Policy, where []string, labels []map[string]string) {
	const n = 10_000
	r := rand.New(rand.NewPCG(1, 2))
	for i := range n {
		namespace, app := fmt.Sprint("ns-", i%namespaces), fmt.Sprint("app-", i)
		p := with(pol(namespace, fmt.Sprint("p-", i), r.IntN(1000), policy.Mode(i%4)), ports{8080: S, 9090: D}, "app", app, "mesh", "on")
		if i < namespaces && namespaces > 1 {
			p.Selector = nil
		}
		policies = append(policies, p)
		where = append(where, namespace)
		labels = append(labels, map[string]string{"app": app, "mesh": "on", "version": "v1", "pod-template-hash": fmt.Sprint(i)})
	}
	return append(policies, mesh(S)), where, labels
}

func BenchmarkL8_FullRebuild(b *testing.B) {
	for _, namespaces := range []int{1, 100, 5000} {
		policies, where, labels := fleet(namespaces)
		b.Run(fmt.Sprintf("namespaces=%d", namespaces), func(b *testing.B) {
			for b.Loop() {
				set := policy.New(policies, rootNS)
				for i := range where {
					set.Resolve(where[i], labels[i])
				}
			}
		})
	}
}

// BenchmarkL8_OneChange compiles what changed and decides for every workload.
func BenchmarkL8_OneChange(b *testing.B) {
	for _, namespaces := range []int{1, 100, 5000} {
		policies, where, labels := fleet(namespaces)
		set := policy.New(policies, rootNS)
		var changed []policy.Policy
		for _, p := range policies {
			if p.Namespace == "ns-0" {
				changed = append(changed, p)
			}
		}
		b.Run(fmt.Sprintf("namespaces=%d", namespaces), func(b *testing.B) {
			for b.Loop() {
				next := set.WithNamespace("ns-0", changed)
				for i := range where {
					next.Resolve(where[i], labels[i])
				}
			}
		})
	}
}

func BenchmarkResolve(b *testing.B) {
	policies, where, labels := fleet(100)
	set := policy.New(policies, rootNS)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		set.Resolve(where[i%len(where)], labels[i%len(where)])
	}
}
