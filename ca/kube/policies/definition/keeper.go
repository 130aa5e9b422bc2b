package definition

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
)

const (
	callTimeout = 5 * time.Second
	// interval is how often the definition is looked at; soon, while it is not as it
	// should be.
	interval = 10 * time.Second
	soon     = time.Second
)

// Keeper keeps the definition. Its methods are safe for concurrent use.
type Keeper struct {
	client dynamic.Interface
	log    *slog.Logger
}

// NewKeeper makes a Keeper; it does nothing before Run.
func NewKeeper(client dynamic.Interface, log *slog.Logger) (*Keeper, error) {
	if client == nil || log == nil {
		return nil, errors.New("definition of PeerAuthentication: a client and a log must both be given")
	}
	return &Keeper{client, log}, nil
}

// Outcome is what [Keeper.Ensure] has found or done.
type Outcome string

// The outcomes.
const (
	Made     Outcome = "made"     // there was none
	Replaced Outcome = "replaced" // it was ours, and older
	Kept     Outcome = "kept"     // it is ours, of this version or a newer one
	Foreign  Outcome = "foreign"  // it is somebody else's
	Going    Outcome = "going"    // it is being deleted
)

// Run keeps the definition until ctx ends.
func (k *Keeper) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		outcome, err := k.Ensure(ctx)
		if ctx.Err() != nil {
			return nil
		}
		now := string(outcome)
		if err != nil {
			now = err.Error()
		}
		if now != said {
			said = now
			k.tell(outcome, err)
		}
		if err != nil || outcome == Going {
			timer.Reset(soon)
		} else {
			timer.Reset(interval)
		}
	}
}

func (k *Keeper) tell(outcome Outcome, err error) {
	switch {
	case err != nil:
		k.log.Error("the definition of PeerAuthentication is not as it should be", "definition", Name, "error", err)
	case outcome == Foreign:
		k.log.Info("PeerAuthentication is defined by somebody else, and that definition is left alone", "definition", Name)
	default:
		k.log.Info("PeerAuthentication is defined by meshca", "definition", Name, "outcome", string(outcome))
	}
}

// Ensure makes the definition if there is none, and replaces an older one of ours.
func (k *Keeper) Ensure(ctx context.Context) (Outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for {
		outcome, err := k.ensure(ctx)
		// The API server itself writes a definition's status, and another replica may
		// have been first.
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			return outcome, err
		}
	}
}

func (k *Keeper) ensure(ctx context.Context) (Outcome, error) {
	want, err := wanted()
	if err != nil {
		return "", err
	}
	found, err := k.client.Resource(Resource).Get(ctx, Name, meta.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = k.client.Resource(Resource).Create(ctx, want, meta.CreateOptions{})
		return Made, explain("create", err)
	}
	if err != nil {
		return "", explain("get", err)
	}
	return k.judge(ctx, want, found)
}

// judge decides about a definition that is there.
func (k *Keeper) judge(ctx context.Context, want, found *unstructured.Unstructured) (Outcome, error) {
	newest, _ := schemaOf(want)
	number, _ := schemaOf(found)
	switch {
	case found.GetDeletionTimestamp() != nil:
		return Going, nil
	case !IsOurs(found):
		return Foreign, nil
	case number >= newest:
		return Kept, nil
	}
	next := found.DeepCopy() // with whatever else others have noted on it
	next.Object["spec"] = want.Object["spec"]
	notes := next.GetAnnotations()
	notes[schemaNote] = want.GetAnnotations()[schemaNote]
	next.SetAnnotations(notes)
	// Its resourceVersion makes this fail if anybody has changed it since.
	_, err := k.client.Resource(Resource).Update(ctx, next, meta.UpdateOptions{})
	return Replaced, explain("update", err)
}

func explain(verb string, err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsForbidden(err):
		return fmt.Errorf("the CA may not %s customresourcedefinitions.apiextensions.k8s.io %q; give its ServiceAccount that permission, or apply a definition yourself: %w", verb, Name, err)
	}
	return fmt.Errorf("asking the API server to %s the definition %q: %w", verb, Name, err)
}
