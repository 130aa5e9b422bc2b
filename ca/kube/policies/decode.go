package policies

import (
	"encoding/json"
	"fmt"
	"strconv"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

const group = "security.istio.io"

// Resource returns PeerAuthentication's name in a version of its API.
func Resource(version string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: group, Version: version, Resource: "peerauthentications"}
}

// Object is a PeerAuthentication of the API server. It must not be changed.
type Object struct {
	manifest.Policy
	APIVersion string
	UID        string
	Generation int64
	// Version is the resourceVersion as the API server wrote it.
	Version string
	// Conditions is the list status.conditions, as it came.
	Conditions []any
}

// Decode reads an object as the CA does, for whoever explains what it decides.
func Decode(u *unstructured.Unstructured) Object { return decode(u) }

// decode reads an object. Whatever the API server let in has a meaning: what is not
// understood whole is STRICT for what it selects, as far as that is understood.
func decode(u *unstructured.Unstructured) Object {
	o := Object{
		APIVersion: u.GetAPIVersion(), UID: string(u.GetUID()), Generation: u.GetGeneration(), Version: u.GetResourceVersion(),
	}
	o.Conditions, _, _ = unstructured.NestedSlice(u.Object, "status", "conditions")
	o.Policy = read(u)
	ref := policy.Ref{Namespace: u.GetNamespace(), Name: u.GetName()}
	if worst, ok := o.Policy.Worst(); ok && worst.Verdict == manifest.Unusable {
		o.Mode, o.Ports = policy.Unknown, nil
	}
	o.Ref = ref
	o.Created = u.GetCreationTimestamp().UTC()
	return o
}

// read has the object judged as if it stood in a file.
func read(u *unstructured.Unstructured) manifest.Policy {
	spec, hasSpec := u.Object["spec"]
	bare := map[string]any{
		"apiVersion": u.GetAPIVersion(), "kind": u.GetKind(),
		"metadata": map[string]any{"name": u.GetName(), "namespace": u.GetNamespace()},
	}
	if hasSpec {
		bare["spec"] = spec
	}
	data, err := json.Marshal(bare)
	var contents *manifest.Contents
	if err == nil {
		contents, err = manifest.Parse(data, 1)
	}
	if err == nil && len(contents.Policies) != 1 {
		err = fmt.Errorf("it is of kind %.64q", u.GetKind())
	}
	if err != nil {
		return manifest.Policy{Problems: []manifest.Problem{{Code: "PV0", Verdict: manifest.Unusable, Text: err.Error()}}}
	}
	return contents.Policies[0]
}

// number reads a resourceVersion. Since Kubernetes 1.35 those of one collection are
// numbers that can be compared.
func number(version string) (uint64, error) {
	n, err := strconv.ParseUint(version, 10, 64)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("resourceVersion %.64q is no number; policies need Kubernetes 1.35 or newer", version)
	}
	return n, nil
}
