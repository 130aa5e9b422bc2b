package check

import (
	"context"
	"fmt"

	"go.yaml.in/yaml/v3"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// settings are those of the CA that checks depend on.
type settings struct {
	RootNamespace string         `yaml:"root_namespace"`
	Upstream      map[string]any `yaml:"upstream"`
	Kubernetes    struct {
		Callers            string `yaml:"callers"`
		IstioCompatibility bool   `yaml:"istio_compatibility"`
	} `yaml:"kubernetes"`
}

// readSettings returns the installation's, or what the chart would have where there
// is none. The CA judges its configuration itself; here it is only read.
func (r *run) readSettings(ctx context.Context) (*settings, error) {
	return r.settings.get(func() (*settings, error) {
		s := &settings{RootNamespace: r.RootNamespace}
		cm, err := r.client.CoreV1().ConfigMaps(r.Namespace).Get(ctx, "meshca-config", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return s, nil
		}
		if err != nil {
			return nil, fmt.Errorf("reading the CA's configuration: %w", err)
		}
		if err := yaml.Unmarshal([]byte(cm.Data["meshca.yaml"]), s); err != nil {
			return nil, fmt.Errorf("reading the CA's configuration in ConfigMap meshca-config: %w", err)
		}
		return s, nil
	})
}
