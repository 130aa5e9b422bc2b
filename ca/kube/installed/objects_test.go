package installed

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// TestF64_TheListIsTheManifest holds the list against what users install: an object that
// is missing here is neither checked nor ever taken away.
func TestF64_TheListIsTheManifest(t *testing.T) {
	manifest, err := os.ReadFile("../../../deploy/meshca.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var rendered, listed []string
	for d := yaml.NewDecoder(bytes.NewReader(manifest)); ; {
		var o struct {
			APIVersion string `yaml:"apiVersion"`
			Kind       string
			Metadata   struct {
				Name, Namespace string
				Labels          map[string]string
			}
		}
		err := d.Decode(&o)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if o.Kind == "" || o.Kind == "Namespace" {
			continue
		}
		rendered = append(rendered, o.APIVersion+" "+Object{Kind: o.Kind, Namespace: o.Metadata.Namespace, Name: o.Metadata.Name}.String())
		if o.Metadata.Labels["app.kubernetes.io/name"] != "meshca" {
			t.Errorf("%s %s has not the label that tells it to be ours", o.Kind, o.Metadata.Name)
		}
	}
	for _, o := range Objects("meshca-system", "meshca-agents") {
		listed = append(listed, o.Resource.GroupVersion().String()+" "+o.String())
	}
	slices.Sort(rendered)
	slices.Sort(listed)
	if diff := cmp.Diff(rendered, listed); diff != "" {
		t.Errorf("the manifest (-) and the list (+): %s", diff)
	}
}
