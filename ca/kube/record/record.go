// Package record keeps the record of a mesh's roots in a ConfigMap, for a CA in a
// cluster whose roots are an upstream's. Its [Store] is for package roots, which says
// what stands in the record.
//
// In the CA's namespace it needs to create ConfigMaps, to get and update meshca-bundle,
// and to get meshca-roots.
package record

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/roots"
)

// Name is the ConfigMap's.
const Name = "meshca-bundle"

const key = "bundle.json"

// requestTimeout bounds one request, so that an API server that hangs shows.
const requestTimeout = 10 * time.Second

// Store is a [roots.Store] in the CA's namespace. It is safe for concurrent use.
type Store struct {
	client    typedcorev1.CoreV1Interface
	namespace string
}

var _ roots.Store = (*Store)(nil)

// New asks nobody yet.
func New(client typedcorev1.CoreV1Interface, namespace string) *Store {
	return &Store{client, namespace}
}

// OwnRootError says that a namespace has a root of its own, which its mesh trusts,
// while the CA is to use another upstream.
type OwnRootError struct{ Namespace string }

func (e *OwnRootError) Error() string {
	return fmt.Sprintf("namespace %q holds a root that meshca made for itself (ConfigMap %s), and the configuration names another upstream; moving a running mesh from one to the other is not built yet: leave \"upstream\" out, or use another namespace for a new mesh",
		e.Namespace, state.MarkerName)
}

// Load implements [roots.Store]. It returns an [*OwnRootError] where a mesh would be led
// away from the root that it has.
func (s *Store) Load(ctx context.Context) ([]byte, string, error) {
	cm, err := s.get(ctx, Name)
	if err == nil {
		return []byte(cm.Data[key]), cm.ResourceVersion, nil
	}
	if !apierrors.IsNotFound(err) {
		return nil, "", err
	}
	_, err = s.get(ctx, state.MarkerName)
	switch {
	case err == nil:
		return nil, "", &OwnRootError{Namespace: s.namespace}
	case apierrors.IsNotFound(err):
		return nil, "", nil
	}
	return nil, "", err
}

func (s *Store) get(ctx context.Context, name string) (*corev1.ConfigMap, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cm, err := s.client.ConfigMaps(s.namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("reading ConfigMap %s in namespace %q: %w", name, s.namespace, err)
	}
	return cm, nil
}

// Save implements [roots.Store]: a create where nothing was, an update of exactly that
// version where something was.
func (s *Store) Save(ctx context.Context, data []byte, version string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cm := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{
			Name: Name, Namespace: s.namespace, ResourceVersion: version,
			Labels: map[string]string{"app.kubernetes.io/managed-by": "meshca"},
		},
		Data: map[string]string{key: string(data)},
	}
	var err error
	if version == "" {
		_, err = s.client.ConfigMaps(s.namespace).Create(ctx, cm, metav1.CreateOptions{})
	} else {
		_, err = s.client.ConfigMaps(s.namespace).Update(ctx, cm, metav1.UpdateOptions{})
	}
	switch {
	case err == nil:
		return nil
	case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err), apierrors.IsNotFound(err) && version != "":
		err = errors.Join(roots.ErrConflict, err)
	}
	return fmt.Errorf("writing ConfigMap %s in namespace %q: %w", Name, s.namespace, err)
}
