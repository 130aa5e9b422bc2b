package rights

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// role is a Role or ClusterRole of the manifest.
type role struct {
	Kind     string
	Metadata struct{ Name, Namespace string }
	Rules    []struct {
		APIGroups       []string `yaml:"apiGroups"`
		Resources       []string
		ResourceNames   []string `yaml:"resourceNames"`
		NonResourceURLs []string `yaml:"nonResourceURLs"`
		Verbs           []string
	}
}

func (r *role) rights() []string {
	var all []string
	for _, have := range r.Rules {
		for _, url := range have.NonResourceURLs {
			for _, verb := range have.Verbs {
				all = append(all, Right{Verb: verb, URL: url}.String())
			}
		}
		for _, group := range have.APIGroups {
			as := rule{r.Metadata.Namespace, group, have.Resources, have.ResourceNames, have.Verbs}
			for _, right := range as.spread() {
				all = append(all, right.String())
			}
		}
	}
	return all
}

// TestF32_TheManifestGrantsExactlyThese holds the list against what users install.
func TestF32_TheManifestGrantsExactlyThese(t *testing.T) {
	manifest, err := os.ReadFile("../../../deploy/meshca.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var granted []string
	for d := yaml.NewDecoder(bytes.NewReader(manifest)); ; {
		var r role
		err := d.Decode(&r)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(r.Kind, "Role") && r.Metadata.Name == "meshca" {
			granted = append(granted, r.rights()...)
		}
	}
	var listed []string
	for _, r := range CA(Options{Namespace: "meshca-system"}) {
		listed = append(listed, r.String())
	}
	slices.Sort(granted)
	slices.Sort(listed)
	for _, r := range granted {
		if _, found := slices.BinarySearch(listed, r); !found {
			t.Errorf("granted and not in the list: %s", r)
		}
	}
	for _, r := range listed {
		if _, found := slices.BinarySearch(granted, r); !found {
			t.Errorf("in the list and not granted: %s", r)
		}
	}
	if !slices.Equal(slices.Compact(granted), granted) {
		t.Error("something is granted twice")
	}
}

// The chart's templates have two branches that the manifest does not show.
func TestF32_RightsThatDependOnSettings(t *testing.T) {
	text := func(o Options) string {
		var s strings.Builder
		for _, r := range CA(o) {
			s.WriteString(r.String() + "\n")
		}
		return s.String()
	}
	plain, other := text(Options{Namespace: "a"}), text(Options{Namespace: "a", TokenReview: true, IstioCompatibility: true})
	for _, tt := range []struct {
		right string
		plain bool
		other bool
	}{
		{"get /openid/v1/jwks\n", true, false},
		{"create tokenreviews.authentication.k8s.io\n", false, true},
		{"patch configmaps \"istio-ca-root-cert\"\n", false, true},
		{"patch peerauthentications.security.istio.io/status\n", true, true},
		{"get secrets \"meshca-root-8\" in namespace a\n", true, true},
	} {
		if strings.Contains(plain, tt.right) != tt.plain || strings.Contains(other, tt.right) != tt.other {
			t.Errorf("%q: plain %v, other %v", tt.right, strings.Contains(plain, tt.right), strings.Contains(other, tt.right))
		}
	}
}
