package definition

import (
	_ "embed" // the definition that is made
	"fmt"
	"maps"
	"strconv"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Name is the definition's.
const Name = "peerauthentications.security.istio.io"

const (
	managedBy  = "app.kubernetes.io/managed-by"
	meshca     = "meshca"
	schemaNote = "meshca.dev/definition-schema"
)

// istioLabels are on Istio's own definition, one or the other by its version.
var istioLabels = []string{"istio", "operator.istio.io/component"}

// Resource names CustomResourceDefinitions.
var Resource = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

//go:embed peerauthentication.yaml
var text []byte

// wanted is the definition that this version makes. v1 and v1beta1 are the same but
// for their names.
func wanted() (*unstructured.Unstructured, error) {
	var o map[string]any
	if err := yaml.Unmarshal(text, &o); err != nil {
		return nil, fmt.Errorf("reading the definition of PeerAuthentication: %w", err)
	}
	// The API's own number types.
	o = normal(o).(map[string]any)
	versions, _, err := unstructured.NestedSlice(o, "spec", "versions")
	if err != nil || len(versions) != 1 {
		return nil, fmt.Errorf("reading the definition of PeerAuthentication: it has %d versions, not one (%v)", len(versions), err)
	}
	older := maps.Clone(versions[0].(map[string]any))
	older["name"], older["storage"] = "v1beta1", false
	if err := unstructured.SetNestedSlice(o, append(versions, older), "spec", "versions"); err != nil {
		return nil, err
	}
	return &unstructured.Unstructured{Object: o}, nil
}

func normal(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = normal(v[k])
		}
	case []any:
		for i := range v {
			v[i] = normal(v[i])
		}
	case int:
		return int64(v)
	}
	return v
}

// schemaOf returns the number of a definition's schema, and whether the definition
// is ours.
func schemaOf(d *unstructured.Unstructured) (number int, ours bool) {
	if d.GetLabels()[managedBy] != meshca {
		return 0, false
	}
	number, err := strconv.Atoi(d.GetAnnotations()[schemaNote])
	return number, err == nil
}

// IsIstios reports whether a definition is Istio's, or one of ours that Istio has
// taken over. That is the sign by which Istio counts as present: it brings its
// definition with it, and leaves it behind when it goes.
func IsIstios(d *unstructured.Unstructured) bool {
	for _, l := range istioLabels {
		if _, ok := d.GetLabels()[l]; ok {
			return true
		}
	}
	return false
}

// IsOurs reports whether a definition was made by meshca, and nobody has taken it over.
func IsOurs(d *unstructured.Unstructured) bool {
	_, ours := schemaOf(d)
	return ours && !IsIstios(d)
}
