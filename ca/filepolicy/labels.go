package filepolicy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"

	"go.yaml.in/yaml/v3"

	"github.com/meshca/meshca/identity"
)

const (
	maxLabelsFile = 4 << 20 // bytes
	maxWorkloads  = 20_000
	maxLabels     = 100 // of one workload
	maxLabelKey   = 317 // a DNS subdomain, a slash and 63 bytes, as the API server has it
	maxLabelValue = 63
)

// workload is how the file names one: by what its token proves.
type workload struct{ namespace, account string }

// labelled are the labels of the workloads that the file names.
type labelled map[workload]map[string]string

// parseLabels reads the file:
//
//	workloads:
//	  - namespace: shop
//	    service_account: cart
//	    labels: {app: cart}
//
// One mistake refuses all of it.
func parseLabels(data []byte) (labelled, error) {
	var file struct {
		Workloads []struct {
			Namespace string            `yaml:"namespace"`
			Account   string            `yaml:"service_account"`
			Labels    map[string]string `yaml:"labels"`
		} `yaml:"workloads"`
	}
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(&file); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, errors.New(`it is empty; to name no workload, write "workloads: []"`)
		}
		return nil, plain(err)
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("it holds more than one YAML document; put all workloads into one list")
	}
	if len(file.Workloads) > maxWorkloads {
		return nil, fmt.Errorf("it names %d workloads, at most %d", len(file.Workloads), maxWorkloads)
	}
	td, err := identity.ParseTrustDomain("any.test") // only the names are judged
	if err != nil {
		return nil, err
	}
	all := make(labelled, len(file.Workloads))
	for i, w := range file.Workloads {
		if _, err := identity.WorkloadID(td, w.Namespace, w.Account); err != nil {
			return nil, fmt.Errorf("workload %d: %w", i+1, err)
		}
		key := workload{w.Namespace, w.Account}
		if _, twice := all[key]; twice {
			return nil, fmt.Errorf("workload %d: %s/%s is named twice", i+1, w.Namespace, w.Account)
		}
		if err := checkLabels(w.Labels); err != nil {
			return nil, fmt.Errorf("workload %d, %s/%s: %w", i+1, w.Namespace, w.Account, err)
		}
		all[key] = w.Labels
	}
	return all, nil
}

var unknownField = regexp.MustCompile(`^line (\d+): field (\S+) not found in type`)

// plain says of YAML's errors what a writer of the file can use: no Go types.
func plain(err error) error {
	var types *yaml.TypeError
	if !errors.As(err, &types) || len(types.Errors) == 0 {
		return err
	}
	if m := unknownField.FindStringSubmatch(types.Errors[0]); m != nil {
		return fmt.Errorf("line %s: unknown key %q; known are workloads and, for each, namespace, service_account and labels", m[1], m[2])
	}
	return errors.New(types.Errors[0])
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fmt.Errorf("it has %d labels, at most %d", len(labels), maxLabels)
	}
	for k, v := range labels {
		switch {
		case k == "" || len(k) > maxLabelKey:
			return fmt.Errorf("the label's key %.256q has %d bytes; 1 to %d are allowed", k, len(k), maxLabelKey)
		case len(v) > maxLabelValue:
			return fmt.Errorf("the value of label %q has %d bytes; at most %d are allowed", k, len(v), maxLabelValue)
		}
	}
	return nil
}
