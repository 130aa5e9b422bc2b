package status

import (
	"fmt"
	"slices"
	"time"

	"github.com/meshca/meshca/ca/kube/policies"
)

// find returns the condition that is ours.
func find(conditions []any) (map[string]any, bool) {
	for _, c := range conditions {
		if c, ok := c.(map[string]any); ok && c["type"] == ConditionType {
			return c, true
		}
	}
	return nil, false
}

// heldBy is the verdict that an object's status has.
func heldBy(o policies.Object) (v verdict, ok bool) {
	c, ok := find(o.Conditions)
	if !ok {
		return verdict{}, false
	}
	v.effective = c["status"] == "True"
	v.reason, _ = c["reason"].(string)
	v.message, _ = c["message"].(string)
	return v, true
}

// withCondition returns an object's conditions with ours as the verdict has it, and
// whether that makes them others.
func withCondition(o policies.Object, v verdict, now time.Time) (next []any, changed bool) {
	old, had := find(o.Conditions)
	before, _ := heldBy(o)
	// The API allows a number and a text.
	if had && before == v && fmt.Sprint(old["observedGeneration"]) == fmt.Sprint(o.Generation) {
		return o.Conditions, false
	}
	c := map[string]any{
		"type": ConditionType, "status": "False", "reason": v.reason, "message": v.message,
		"observedGeneration": o.Generation,
		"lastTransitionTime": now.UTC().Format(time.RFC3339),
	}
	if v.effective {
		c["status"] = "True"
	}
	if had && before.effective == v.effective && old["lastTransitionTime"] != nil {
		c["lastTransitionTime"] = old["lastTransitionTime"]
	}
	others := slices.DeleteFunc(slices.Clone(o.Conditions), func(c any) bool {
		m, ok := c.(map[string]any)
		return ok && m["type"] == ConditionType
	})
	return append(others, c), true
}
