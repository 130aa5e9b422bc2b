package policies

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
)

// RecordName is the ConfigMap that remembers how many policies there were.
const RecordName = "meshca-policies"

const recordKey = "record"

var configMaps = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}

// record says under which definition policies were known last, and how many.
type record struct {
	Definition string `json:"definition"` // its UID; empty: never
	Policies   int    `json:"policies"`
}

// known returns the record of this process.
func (s *Source) known() record {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.record
}

// remember replaces the record of this process.
func (s *Source) remember(definition string, policies int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := record{definition, policies}
	if next == s.record {
		return
	}
	s.record = next
	close(s.recorded)
	s.recorded = make(chan struct{})
}

func (s *Source) records() dynamic.ResourceInterface {
	return s.conf.Client.Resource(configMaps).Namespace(s.conf.Namespace)
}

// loadRecord reads what an earlier process, or another replica, has remembered.
func (s *Source) loadRecord(ctx context.Context) (record, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	o, err := s.records().Get(ctx, RecordName, meta.GetOptions{})
	if apierrors.IsNotFound(err) {
		return record{}, nil
	}
	if err != nil {
		return record{}, s.recordError("get", err)
	}
	return parseRecord(o)
}

func parseRecord(o *unstructured.Unstructured) (record, error) {
	text, _, _ := unstructured.NestedString(o.Object, "data", recordKey)
	var r record
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return record{}, fmt.Errorf("reading how many policies there were from ConfigMap %q, key %q: %w; delete the ConfigMap to have the policies counted as they are now", RecordName, recordKey, err)
	}
	return r, nil
}

func (s *Source) recordError(verb string, err error) error {
	if apierrors.IsForbidden(err) {
		return fmt.Errorf("the CA may not %s configmaps %q in namespace %q; give its ServiceAccount that permission: %w", verb, RecordName, s.conf.Namespace, err)
	}
	return fmt.Errorf("asking the API server to %s ConfigMap %q in namespace %q: %w", verb, RecordName, s.conf.Namespace, err)
}

// Remember keeps the record up to date until ctx ends. It is for the one replica that
// leads; that another one believes to lead too does no harm.
func (s *Source) Remember(ctx context.Context) error {
	said := ""
	for {
		s.mu.Lock()
		r, changed := s.record, s.recorded
		s.mu.Unlock()
		var again <-chan time.Time
		if r.Definition != "" {
			err := s.storeRecord(ctx, r)
			if err != nil && ctx.Err() == nil {
				again = time.After(lookAgain)
				if said != err.Error() {
					said = err.Error()
					s.conf.Log.Error("how many policies there are cannot be remembered; a replica that starts could take them for deleted if their definition is", "error", err)
				}
			} else {
				said = ""
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
		// A burst of policies is written as a few records.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookAgain):
		}
	}
}

func (s *Source) storeRecord(ctx context.Context, r record) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	o, err := s.records().Get(ctx, RecordName, meta.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = s.records().Create(ctx, newRecord(string(text)), meta.CreateOptions{})
		if err != nil {
			return s.recordError("create", err)
		}
		return nil
	}
	if err != nil {
		return s.recordError("get", err)
	}
	if old, _, _ := unstructured.NestedString(o.Object, "data", recordKey); old == string(text) {
		return nil
	}
	if err := unstructured.SetNestedField(o.Object, string(text), "data", recordKey); err != nil {
		return err
	}
	if _, err := s.records().Update(ctx, o, meta.UpdateOptions{}); err != nil {
		return s.recordError("update", err)
	}
	return nil
}

func newRecord(text string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{
			"name":   RecordName,
			"labels": map[string]any{"app.kubernetes.io/managed-by": "meshca"},
		},
		"data": map[string]any{recordKey: text},
	}}
}
