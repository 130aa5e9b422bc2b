package state

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/identity"
)

// requestTimeout bounds one request, so that an API server that hangs shows.
const requestTimeout = 10 * time.Second

// api reads and writes the objects of one namespace, and judges what it reads.
type api struct {
	client    typedcorev1.CoreV1Interface
	namespace string
	td        identity.TrustDomain
}

// held is a root in memory.
type held struct {
	number  int
	cert    *x509.Certificate
	key     crypto.Signer
	certPEM []byte
	keyPEM  []byte
	// changeable says that the Secret that was read could be edited.
	changeable bool
	origin     origin // zero unless it was read
}

// origin is what a root's Secret says of where it comes from.
type origin struct {
	created time.Time
	writers string   // who wrote it, as the API server took note
	flaws   []string // what a CA would have made otherwise
}

func originOf(s *corev1.Secret) origin {
	o := origin{created: s.CreationTimestamp.Time}
	var writers []string
	for _, m := range s.ManagedFields {
		writers = append(writers, m.Manager)
	}
	o.writers = strings.Join(writers, ", ")
	if s.Type != SecretType {
		o.flaws = append(o.flaws, fmt.Sprintf("its type is %q and not %q", s.Type, SecretType))
	}
	if s.Immutable == nil || !*s.Immutable {
		o.flaws = append(o.flaws, "it is not immutable")
	}
	if s.Labels[managedBy] != "meshca" {
		o.flaws = append(o.flaws, "it lacks the label "+managedBy+"=meshca")
	}
	return o
}

// stored is a text in a ConfigMap.
type stored struct {
	text            string
	resourceVersion string // empty if there is no such object
}

func (s stored) found() bool { return s.resourceVersion != "" }

// read returns one text of a ConfigMap. A ConfigMap that lacks it is damaged by
// having the empty text, which nothing parses.
func (a *api) read(ctx context.Context, name, key string) (stored, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cm, err := a.client.ConfigMaps(a.namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return stored{}, nil
	}
	if err != nil {
		return stored{}, fmt.Errorf("reading ConfigMap %s in namespace %q: %w", name, a.namespace, err)
	}
	return stored{cm.Data[key], cm.ResourceVersion}, nil
}

func (a *api) readMarker(ctx context.Context) (stored, error) {
	return a.read(ctx, MarkerName, markerKey)
}

func (a *api) readState(ctx context.Context) (stored, error) {
	return a.read(ctx, StateName, stateKey)
}

// write puts a text in place of what was read: a create where nothing was, an
// update of exactly that version where something was. An error does not mean
// that nothing was written.
func (a *api) write(ctx context.Context, name, key string, over stored, text []byte) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cm := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: a.namespace, Labels: map[string]string{managedBy: "meshca"}},
		Data:       map[string]string{key: string(text)},
	}
	var err error
	if over.found() {
		cm.ResourceVersion = over.resourceVersion
		_, err = a.client.ConfigMaps(a.namespace).Update(ctx, cm, metav1.UpdateOptions{})
	} else {
		_, err = a.client.ConfigMaps(a.namespace).Create(ctx, cm, metav1.CreateOptions{})
	}
	if err != nil {
		return fmt.Errorf("writing ConfigMap %s in namespace %q: %w", name, a.namespace, err)
	}
	return nil
}

func (a *api) writeMarker(ctx context.Context, over stored, m Marker) error {
	return a.write(ctx, MarkerName, markerKey, over, encode(m))
}

func (a *api) writeState(ctx context.Context, over stored, s State) error {
	return a.write(ctx, StateName, stateKey, over, encode(s))
}

// outrun reports whether a write failed because somebody else's came first.
func outrun(err error) bool { return apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) }

// readRoot returns root n, nil if its Secret is not there.
func (a *api) readRoot(ctx context.Context, n int) (*held, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	s, err := a.client.Secrets(a.namespace).Get(ctx, SecretName(n), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading Secret %s in namespace %q: %w", SecretName(n), a.namespace, err)
	}
	h, err := parseRoot(n, s.Data[certKey], s.Data[keyKey], a.td)
	if err != nil {
		return nil, &CorruptError{Object: "Secret " + SecretName(n), Reason: err.Error()}
	}
	h.changeable = s.Immutable == nil || !*s.Immutable
	h.origin = originOf(s)
	return h, nil
}

func parseRoot(n int, certPEM, keyPEM []byte, td identity.TrustDomain) (*held, error) {
	cert, err := ca.ParseRootCertificate(certPEM, td)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", certKey, err)
	}
	key, err := ca.ParseRootKey(keyPEM, cert)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyKey, err)
	}
	// A part of the encoding repeats the public key and is read by nobody.
	if again, err := ca.EncodeRootKey(key); err != nil || !bytes.Equal(again, keyPEM) {
		return nil, fmt.Errorf("%s: it is not in the form in which it was written", keyKey)
	}
	return &held{number: n, cert: cert, key: key, certPEM: bytes.Clone(certPEM), keyPEM: bytes.Clone(keyPEM)}, nil
}

// createRoot makes the Secret of a root, or fails where there is one.
func (a *api) createRoot(ctx context.Context, h *held) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	immutable := true
	_, err := a.client.Secrets(a.namespace).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: SecretName(h.number), Namespace: a.namespace, Labels: map[string]string{managedBy: "meshca"}},
		Type:       SecretType,
		Immutable:  &immutable,
		Data:       map[string][]byte{certKey: h.certPEM, keyKey: h.keyPEM},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("creating Secret %s in namespace %q: %w", SecretName(h.number), a.namespace, err)
	}
	return nil
}

// wanted returns root n as the marker describes it.
func (a *api) wanted(ctx context.Context, m Mark) (*held, error) {
	h, err := a.readRoot(ctx, m.Number)
	if err != nil {
		return nil, err
	}
	if h == nil {
		return nil, &LostError{Namespace: a.namespace, Object: "Secret " + SecretName(m.Number), Proof: "ConfigMap " + MarkerName}
	}
	return h, h.matches(m)
}

func (h *held) matches(m Mark) error {
	if got := mark(h.number, h.cert); got.Certificate != m.Certificate {
		return &ReplacedError{Object: "Secret " + SecretName(h.number), Number: h.number, Held: got.Certificate, Want: m.Certificate}
	}
	return nil
}
