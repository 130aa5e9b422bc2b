package state

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/meshca/meshca/identity"
)

// Names of the objects and of what lies in them.
const (
	MarkerName = "meshca-roots"
	StateName  = "meshca-state"
	SecretType = "meshca.dev/root"

	markerKey = "roots.json"
	stateKey  = "state.json"
	certKey   = "root.pem"
	keyKey    = "root.key"

	managedBy = "app.kubernetes.io/managed-by"
)

// SecretName is the name of the Secret of root n.
func SecretName(n int) string { return fmt.Sprintf("meshca-root-%d", n) }

// version is the version of marker and state that this program writes, and the
// highest one that it reads.
const version = 1

// Marker is what outlives the roots: it tells a namespace that never had one from
// one whose root is lost, and an older state from the newest.
type Marker struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`
	Sequence    uint64 `json:"highest_sequence"`
	Epoch       uint64 `json:"highest_epoch"`
	Roots       []Mark `json:"roots"` // root n is the nth
}

// Mark tells of one root that there is or was.
type Mark struct {
	Number      int    `json:"number"`
	KeyID       string `json:"key_id"`
	Certificate string `json:"certificate_sha256"`
	// Retired says that nothing needs the root any more: its Secret may be gone.
	Retired bool `json:"retired"`
}

// Step is how far a rotation of the root has come.
type Step string

// The steps, in their order.
const (
	StepNone        Step = "none"
	StepPrepare     Step = "prepare"
	StepDistribute  Step = "distribute"
	StepAcknowledge Step = "acknowledge"
	StepActivate    Step = "activate"
	StepRenew       Step = "renew"
	StepRetire      Step = "retire"
)

var steps = []Step{StepNone, StepPrepare, StepDistribute, StepAcknowledge, StepActivate, StepRenew, StepRetire}

// State is what all replicas must agree on. Roots go by their numbers.
type State struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`
	Epoch       uint64 `json:"epoch"`    // rises with each write
	Sequence    uint64 `json:"sequence"` // of the bundle; rises when Bundle changes, and never falls
	Bundle      []int  `json:"bundle"`   // roots to believe, ascending
	Active      int    `json:"active"`   // the root that signs intermediates
	Step        Step   `json:"step"`
}

// encode returns the only form in which an object is written, and read.
func encode(v any) []byte {
	// Numbers, strings and slices of them always have a form.
	data, _ := json.MarshalIndent(v, "", "  ")
	return append(data, '\n')
}

func (s State) equal(o State) bool { return bytes.Equal(encode(s), encode(o)) }

func (m Marker) equal(o Marker) bool { return bytes.Equal(encode(m), encode(o)) }

// decode reads what encode wrote and nothing else: a member that is there twice,
// unknown, or in another case would be seen differently by different readers.
func decode[T Marker | State](object string, data string, td identity.TrustDomain, into *T) error {
	// Version and domain first, and of them alone: a newer form may look quite
	// different, and another domain's is not ours to judge.
	var head struct {
		Version     int    `json:"version"`
		TrustDomain string `json:"trust_domain"`
	}
	if err := json.Unmarshal([]byte(data), &head); err != nil {
		return &CorruptError{Object: object, Reason: err.Error()}
	}
	if head.Version > version {
		return &VersionError{Object: object, Have: head.Version, Can: version}
	}
	if head.Version < 1 || head.TrustDomain == "" {
		return &CorruptError{Object: object, Reason: "it does not say which version it has and which trust domain it is of"}
	}
	if head.TrustDomain != td.String() {
		return &TrustDomainError{Object: object, Held: head.TrustDomain, Want: td}
	}
	if err := json.Unmarshal([]byte(data), into); err != nil {
		return &CorruptError{Object: object, Reason: err.Error()}
	}
	if !bytes.Equal(encode(*into), []byte(data)) {
		return &CorruptError{Object: object, Reason: "it is not in the form in which it was written"}
	}
	return nil
}

func parseMarker(object, data string, td identity.TrustDomain) (Marker, error) {
	var m Marker
	if err := decode(object, data, td, &m); err != nil {
		return Marker{}, err
	}
	if len(m.Roots) == 0 {
		return Marker{}, &CorruptError{Object: object, Reason: "it names no root"}
	}
	for i, r := range m.Roots {
		switch {
		case r.Number != i+1:
			return Marker{}, &CorruptError{Object: object, Reason: fmt.Sprintf("root %d stands at place %d", r.Number, i+1)}
		case !isHex(r.Certificate, sha256.Size) || !isHex(r.KeyID, len(r.KeyID)/2) || r.KeyID == "":
			return Marker{}, &CorruptError{Object: object, Reason: fmt.Sprintf("root %d has a fingerprint that is none", r.Number)}
		}
	}
	return m, nil
}

func isHex(s string, size int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == size && hex.EncodeToString(b) == s
}

// parseState reads the state and holds it against the marker, which must have
// been read before it.
func parseState(object, data string, td identity.TrustDomain, m Marker) (State, error) {
	var s State
	if err := decode(object, data, td, &s); err != nil {
		return State{}, err
	}
	if err := s.check(m); err != nil {
		return State{}, &CorruptError{Object: object, Reason: err.Error()}
	}
	if s.Sequence < m.Sequence {
		return State{}, &RollbackError{Object: object, What: "sequence", Have: s.Sequence, Highest: m.Sequence}
	}
	if s.Epoch < m.Epoch {
		return State{}, &RollbackError{Object: object, What: "epoch", Have: s.Epoch, Highest: m.Epoch}
	}
	return s, nil
}

// check says what the state contradicts itself or the marker in.
func (s State) check(m Marker) error {
	switch {
	case s.Epoch == 0 || s.Sequence == 0:
		return fmt.Errorf("epoch %d and sequence %d must be at least 1", s.Epoch, s.Sequence)
	case !slices.Contains(steps, s.Step):
		return fmt.Errorf("%q is no step", s.Step)
	case !slices.IsSorted(s.Bundle) || len(slices.Compact(slices.Clone(s.Bundle))) != len(s.Bundle):
		return fmt.Errorf("the bundle %v is not in order", s.Bundle)
	case !slices.Contains(s.Bundle, s.Active):
		return fmt.Errorf("root %d is active and not in the bundle %v", s.Active, s.Bundle)
	}
	for _, n := range s.Bundle {
		if n < 1 || n > len(m.Roots) || m.Roots[n-1].Retired {
			return fmt.Errorf("the bundle has root %d, which the marker %q does not know as one in use", n, MarkerName)
		}
	}
	return nil
}

// firstMarker is the marker of a namespace whose first root was made just now.
func firstMarker(td identity.TrustDomain, root *x509.Certificate) Marker {
	return Marker{Version: version, TrustDomain: td.String(), Sequence: 1, Roots: []Mark{mark(1, root)}}
}

func mark(number int, root *x509.Certificate) Mark {
	sum := sha256.Sum256(root.Raw)
	return Mark{Number: number, KeyID: hex.EncodeToString(root.SubjectKeyId), Certificate: hex.EncodeToString(sum[:])}
}

// impliedState is the state that a marker leaves no choice about: there was never
// another root, so the bundle was never another.
func (m Marker) impliedState() (State, bool) {
	if len(m.Roots) != 1 || m.Sequence != 1 || m.Roots[0].Retired {
		return State{}, false
	}
	return State{
		Version: version, TrustDomain: m.TrustDomain, Epoch: m.Epoch + 1, Sequence: 1, Bundle: []int{1}, Active: 1, Step: StepNone,
	}, true
}

// join returns the marker that knows all that both know. It never forgets, so
// that replicas that repair the same marker agree in the end whatever the order.
func (m Marker) join(o Marker) (Marker, error) {
	out := m
	out.Sequence, out.Epoch = max(m.Sequence, o.Sequence), max(m.Epoch, o.Epoch)
	out.Roots = slices.Clone(m.Roots)
	for i, r := range o.Roots {
		if i >= len(out.Roots) {
			out.Roots = append(out.Roots, r)
			continue
		}
		have := &out.Roots[i]
		if have.Certificate != r.Certificate {
			return Marker{}, &ReplacedError{Object: "ConfigMap " + MarkerName, Number: r.Number, Held: r.Certificate, Want: have.Certificate}
		}
		have.Retired = have.Retired || r.Retired
	}
	return out, nil
}

// raised returns the marker with what a state proves to have been reached.
func (m Marker) raised(s State) Marker {
	m.Sequence, m.Epoch = max(m.Sequence, s.Sequence), max(m.Epoch, s.Epoch)
	return m
}
