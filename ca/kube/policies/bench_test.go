package policies

import (
	"fmt"
	"testing"
)

// BenchmarkL8_OneChange takes one changed policy of ten thousand from the watch to the
// new decision for a workload, while ten thousand workloads wait.
func BenchmarkL8_OneChange(b *testing.B) {
	for _, namespaces := range []int{1, 100, 5000} {
		b.Run(fmt.Sprintf("namespaces=%d", namespaces), func(b *testing.B) {
			const n = 10_000
			s, l := newSource(b)
			spec := func(i int, mode string) string {
				return fmt.Sprintf(`{"selector": {"matchLabels": {"app": "app-%d", "mesh": "on"}}, "mtls": {"mode": %q}}`, i, mode)
			}
			where := func(i int) string {
				if i%namespaces == 0 {
					return "shop"
				}
				return fmt.Sprint("ns-", i%namespaces)
			}
			list := make([]any, n)
			for i := range n {
				list[i] = object(where(i), fmt.Sprint("p-", i), i+1, spec(i, "STRICT"))
				l.all[fmt.Sprint(i)] = map[string]string{"app": fmt.Sprint("app-", i), "mesh": "on", "version": "v1"}
			}
			must(b, s.all.Replace(list, fmt.Sprint(n)))
			s.nowLook(b)
			id := cart(b)
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				for j := range n {
					s.Policy(id, fmt.Sprint(j))
				}
				change := object("shop", "p-0", n+1+i, spec(0, []string{"STRICT", "DISABLE"}[i%2]))
				b.StartTimer()
				must(b, s.all.Update(change))
				s.nowLook(b)
				if p, _ := s.Policy(id, "0"); p.Version != uint64(n+1+i) {
					b.Fatal(p.Version)
				}
			}
		})
	}
}
