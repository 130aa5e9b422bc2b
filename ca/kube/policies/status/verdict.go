package status

import (
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/meshca/meshca/ca/kube/policies"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/lint"
	"github.com/meshca/meshca/policy/manifest"
)

// ConditionType is the type of the condition that is ours.
const ConditionType = "meshca.dev/Effective"

// maxMessage bounds what is written of one policy, in bytes.
const maxMessage = 1024

// inForce is the reason of a policy that does what it says.
const inForce = "InForce"

// reasons are what conditions and events have instead of a code, the gravest first.
var reasons = []struct{ code, reason string }{
	{"PV", "NotUnderstood"},
	{"PL1", "SelectorInRootNamespace"},
	{"PL2", "OlderPolicyForTheSame"},
	{"PL5", "OlderPolicyWins"},
	{"PL3", "OlderPolicyForSomePods"},
	{"PL4", "PortOfService"},
	{"PL6", "SelectsNoPod"},
}

// verdict is what there is to say about one policy.
type verdict struct {
	effective       bool
	reason, message string
}

// judge says of each policy what becomes of it, by its name. Without pods what
// depends on them is not judged.
func judge(objects []policies.Object, pods []manifest.Pod, rootNamespace string) map[policy.Ref]verdict {
	in := lint.Input{RootNamespace: rootNamespace, Pods: pods}
	for _, o := range objects {
		p := o.Policy
		// The API server has let it in, and it counts, so it takes part: what is wrong
		// with it is no reason to leave it out.
		p.Problems = slices.Clone(p.Problems)
		for i := range p.Problems {
			p.Problems[i].Verdict = manifest.Warned
		}
		in.Policies = append(in.Policies, lint.Policy{Policy: p})
	}
	found := make(map[policy.Ref][]lint.Finding)
	for _, f := range lint.Run(in).Findings {
		found[f.Policy] = append(found[f.Policy], f)
	}
	all := make(map[policy.Ref]verdict, len(objects))
	for _, o := range objects {
		all[o.Ref] = sum(found[o.Ref])
	}
	return all
}

// sum makes one verdict of all that was found about a policy.
func sum(findings []lint.Finding) verdict {
	v := verdict{effective: true, reason: inForce}
	texts := make([]string, 0, len(findings))
	worst := len(reasons)
	for _, f := range findings {
		texts = append(texts, f.Code+": "+f.Text)
		for i, r := range reasons[:worst] {
			if strings.HasPrefix(f.Code, r.code) {
				worst = i
				v.effective, v.reason = false, r.reason
			}
		}
	}
	v.message = cut(strings.Join(texts, "; "))
	if v.message == "" {
		v.message = "the policy does what it says"
	}
	return v
}

func cut(s string) string {
	const more = "…"
	if len(s) <= maxMessage {
		return s
	}
	end := maxMessage - len(more)
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + more
}
