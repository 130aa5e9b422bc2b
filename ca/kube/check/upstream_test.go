package check

import (
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/kube/report"
)

func TestF71_SourcesAreJudged(t *testing.T) {
	until := time.Date(2026, 3, 1, 20, 0, 0, 0, time.UTC)
	doc := func(name string, s *report.Source) *report.Document {
		return &report.Document{Replica: name, Source: s, Signing: report.Signing{Ready: true, Until: until}}
	}
	ok := &report.Source{Kind: "vault", State: "ok"}
	note := &report.Source{Kind: "files", State: "ok", Notes: []string{"the replicas sign leaves with that key itself"}}
	sealed := &report.Source{Kind: "vault", State: "sealed", Detail: "unseal it"}
	for name, tt := range map[string]struct {
		docs   []*report.Document
		status Status
		found  string
		object string
	}{
		"good":    {[]*report.Document{doc("a", ok), doc("b", ok)}, Holds, "vault signs for 2 CAs", ""},
		"a note":  {[]*report.Document{doc("a", note), doc("b", note)}, Attention, "there is something to know", "the replicas sign leaves with that key itself"},
		"sealed":  {[]*report.Document{doc("a", ok), doc("b", sealed)}, Broken, "vault: 1 of 2 CAs cannot", "b: sealed, signs until 2026-03-01 20:00:00Z: unseal it"},
		"no word": {[]*report.Document{doc("a", nil)}, Unknown, "no replica tells of it", ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := judgeSources(tt.docs)
			if r.Status != tt.status || !strings.Contains(r.Found, tt.found) {
				t.Errorf("%v: %s", r.Status, r.Found)
			}
			if got := strings.Join(r.Objects, "\n"); got != tt.object {
				t.Errorf("told %q, want %q", got, tt.object)
			}
		})
	}
}
