package report

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	"github.com/meshca/meshca/identity"
)

// version is the form of a document. A newer program adds fields without raising it,
// and raises it where an older one would misunderstand.
const version = 1

// Bounds of a document.
const (
	MaxBytes = 200 << 10
	MaxRows  = 500 // workloads with something to say about
	maxCalm  = 100 // workloads that are listed without

	maxReason = 160 // bytes
	maxNotes  = 5
	maxDetail = 600 // bytes: of an upstream, which there is one of; what to do comes last
)

// Document is what one replica knows. Times are the replica's.
type Document struct {
	Version int       `json:"version"`
	Replica string    `json:"replica"` // empty: the slot was given up
	Written time.Time `json:"written"`
	Began   time.Time `json:"began"` // when the replica did

	TrustDomain   string `json:"trust_domain"`
	RootNamespace string `json:"root_namespace"` // of policies for the whole mesh
	Agents        string `json:"agents"`         // their namespace

	Signing  Signing  `json:"signing"`
	Upstream *Trouble `json:"upstream,omitempty"` // that the last attempt failed
	// Source is the upstream by its own word; nil for the CA's own root.
	Source   *Source   `json:"source,omitempty"`
	Bundle   Bundle    `json:"bundle"`
	Policy   Policy    `json:"policy"`
	Degraded []Problem `json:"degraded,omitempty"`

	Counts Counts   `json:"counts"`
	Ends   []Bucket `json:"ends"`
	// Rows are the workloads that need attention, and if there is room some of the
	// others, in the order of their names.
	Rows []Row `json:"rows"`
	// Cut counts workloads that need attention and are in Counts only.
	Cut int `json:"cut,omitempty"`
	// Shown and Issued are fingerprints of workloads that need no attention and are not
	// among Rows, enough to tell whether a pod is one of them: those that a stream of
	// this replica shows, and those that have a certificate from it and no stream.
	Shown  Fingerprints `json:"shown,omitempty"`
	Issued Fingerprints `json:"issued,omitempty"`
	// Untold counts those for which there was no room even in these.
	Untold int `json:"untold,omitempty"`
	// Full says that the replica has come to know more workloads than it can remember.
	Full bool `json:"full,omitempty"`
}

// Signing says whether a certificate could be issued.
type Signing struct {
	Ready     bool      `json:"ready"`
	Reason    string    `json:"reason,omitempty"` // why not
	Authority string    `json:"authority,omitempty"`
	Until     time.Time `json:"until,omitzero"` // the intermediate's end
	RenewAt   time.Time `json:"renew_at,omitzero"`
}

// Source is who signs the replica's intermediate, and how that is.
type Source struct {
	Kind   string `json:"kind"`             // "files", "vault"
	State  string `json:"state"`            // "ok", or a word of the kind's own
	Detail string `json:"detail,omitempty"` // what is wrong and what to do
	// RestartLoses says that the replica would not sign if it was restarted now.
	RestartLoses bool      `json:"restart_loses_signing"`
	Next         string    `json:"next,omitempty"` // what it does by itself, at NextAt
	NextAt       time.Time `json:"next_at,omitzero"`
	Notes        []string  `json:"notes,omitempty"`
}

// Trouble is something that goes on.
type Trouble struct {
	Since  time.Time `json:"since,omitzero"`
	Reason string    `json:"reason"`
}

// Bundle is the trust bundle that the replica hands out.
type Bundle struct {
	Sequence uint64 `json:"sequence"`
	Roots    []Root `json:"roots"`
}

// Root is an authority of the bundle.
type Root struct {
	ID   string    `json:"id"` // its key's, hex
	Ends time.Time `json:"ends"`
}

// Policy is how far the replica knows the policies.
type Policy struct {
	Version uint64 `json:"version"`        // 0: not known
	Held    string `json:"held,omitempty"` // why what the API server says is not in force
}

// Problem is a part that does not work.
type Problem struct {
	Part   string `json:"part"`
	Reason string `json:"reason"`
}

// Counts are of workloads, each of which may be in several.
type Counts struct {
	Workloads    int `json:"workloads"`
	Connected    int `json:"connected"` // shown by a stream
	BundleBehind int `json:"bundle_behind"`
	PolicyBehind int `json:"policy_behind"`
	Refused      int `json:"refused"`  // by the CA, and not issued since
	Refusing     int `json:"refusing"` // what they were sent
	EndingSoon   int `json:"ending_soon"`
}

// Bucket counts the certificates issued by this replica that end within so many
// minutes, and not in a smaller bucket; 0 minutes are those that have ended.
type Bucket struct {
	Minutes int `json:"minutes"`
	Count   int `json:"count"`
}

// What a [Finding] is about.
const (
	BundleBehind = "bundle_behind" // the last bundle is not acknowledged
	PolicyBehind = "policy_behind" // the last policy is not
	Refused      = "refused"       // the CA refuses it a certificate
	Refusing     = "refusing"      // its agent or proxy refuses what it is sent
	EndingSoon   = "ending_soon"   // its certificate was not renewed when it should
)

// Finding is why a workload needs attention.
type Finding struct {
	What   string    `json:"what"`
	Since  time.Time `json:"since,omitzero"`
	Reason string    `json:"reason,omitempty"`
}

// Row is one workload.
type Row struct {
	Name      string `json:"name"` // the pod's UID, or the SPIFFE ID where there is no pod
	Namespace string `json:"namespace,omitempty"`
	Pod       string `json:"pod,omitempty"`
	ID        string `json:"id,omitempty"`
	Node      string `json:"node,omitempty"`

	Connected bool      `json:"connected"`      // or was until a moment ago
	Since     time.Time `json:"since,omitzero"` // when its stream began, or ended
	Issued    time.Time `json:"issued,omitzero"`
	Ends      time.Time `json:"ends,omitzero"`
	Bundle    uint64    `json:"bundle"` // acknowledged
	Policy    uint64    `json:"policy"` // acknowledged

	Findings []Finding `json:"findings,omitempty"`
}

// Fingerprints is a set of names, as 32 bits of each.
type Fingerprints []uint32

func fingerprint(name string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // never fails
	return h.Sum32()
}

// Has reports whether a name is in the set. It errs in one of half a million cases
// where there are ten thousand names.
func (f Fingerprints) Has(name string) bool {
	_, found := slices.BinarySearch(f, fingerprint(name))
	return found
}

// MarshalText implements [encoding.TextMarshaler].
func (f Fingerprints) MarshalText() ([]byte, error) {
	raw := make([]byte, 0, 4*len(f))
	for _, n := range f {
		raw = binary.BigEndian.AppendUint32(raw, n)
	}
	return base64.RawStdEncoding.AppendEncode(nil, raw), nil
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (f *Fingerprints) UnmarshalText(text []byte) error {
	raw, err := base64.RawStdEncoding.AppendDecode(nil, text)
	if err != nil {
		return fmt.Errorf("fingerprints: %w", err)
	}
	if len(raw)%4 != 0 {
		return fmt.Errorf("fingerprints: %d bytes are no whole number of them", len(raw))
	}
	*f = make(Fingerprints, 0, len(raw)/4)
	for ; len(raw) > 0; raw = raw[4:] {
		*f = append(*f, binary.BigEndian.Uint32(raw))
	}
	if !slices.IsSorted(*f) {
		return errors.New("fingerprints: they are not in order")
	}
	return nil
}

// Encode returns the document as it is written, within [MaxBytes]: what there is no
// room for is counted.
func (d *Document) Encode() ([]byte, error) {
	d.Version = version
	for {
		data, err := json.Marshal(d)
		if err != nil {
			return nil, fmt.Errorf("encoding the report of %s: %w", d.Replica, err)
		}
		if len(data) <= MaxBytes {
			return data, nil
		}
		switch n := len(d.Rows); {
		case n > MaxRows/5:
			d.drop(n / 10)
		case len(d.Issued) > 0:
			d.Untold, d.Issued = d.Untold+len(d.Issued), nil
		case len(d.Shown) > 0:
			keep := len(d.Shown) / 2
			d.Untold += len(d.Shown) - keep
			d.Shown = d.Shown[:keep]
		case n > 0:
			d.drop(max(1, n/10))
		default:
			return nil, fmt.Errorf("encoding the report of %s: it has %d bytes, at most %d are written", d.Replica, len(data), MaxBytes)
		}
	}
}

// drop leaves the last rows out.
func (d *Document) drop(n int) {
	for _, r := range d.Rows[len(d.Rows)-n:] {
		if len(r.Findings) > 0 {
			d.Cut++
		} else {
			d.count(r)
		}
	}
	d.Rows = d.Rows[:len(d.Rows)-n]
	slices.Sort(d.Shown)
	slices.Sort(d.Issued)
}

// count adds the fingerprint of a workload that is not listed.
func (d *Document) count(r Row) {
	switch {
	case r.Connected:
		d.Shown = append(d.Shown, fingerprint(r.Name))
	case !r.Ends.IsZero():
		d.Issued = append(d.Issued, fingerprint(r.Name))
	}
}

// Parse reads what [Document.Encode] wrote, if by a newer program. What it does not
// know it leaves out; what cannot be meant it refuses.
func Parse(data []byte) (*Document, error) {
	if len(data) > MaxBytes {
		return nil, fmt.Errorf("it has %d bytes; at most %d are read", len(data), MaxBytes)
	}
	d := &Document{}
	if err := json.Unmarshal(data, d); err != nil {
		return nil, fmt.Errorf("it is not a report: %w", err)
	}
	if d.Version != version {
		return nil, fmt.Errorf("it has version %d, and this program knows %d: use the meshca of the version that runs in the cluster", d.Version, version)
	}
	if d.Replica == "" {
		return d, nil
	}
	if d.Written.IsZero() {
		return nil, errors.New("it does not say when it was written")
	}
	if _, err := identity.ParseTrustDomain(d.TrustDomain); err != nil {
		return nil, err
	}
	for _, r := range d.Rows {
		if r.Name == "" {
			return nil, errors.New("it has a workload without a name")
		}
	}
	return d, nil
}

func cut(s string) string { return cutAt(s, maxReason) }

func cutAt(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}

// NewFingerprints makes a set of names.
func NewFingerprints(names ...string) Fingerprints {
	f := make(Fingerprints, 0, len(names))
	for _, n := range names {
		f = append(f, fingerprint(n))
	}
	slices.Sort(f)
	return f
}
