package policies

import (
	"context"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshca/meshca/ca/kube/policies/definition"
)

// AcceptAnnotation, on the definition and with the definition's UID as its value,
// says that the policies which were lost with an older definition are meant to be
// gone. The UID keeps it from saying so of the next one.
const AcceptAnnotation = "meshca.dev/accept-lost-policies"

const callTimeout = 3 * time.Second

// judge returns why what waits must not come into force; "" if it may. What only
// adds to what is in force, or changes it, always may.
//
// The order matters: the definition is looked at after the policies were seen to be
// gone. The API server marks a definition before it deletes the policies, so that
// who sees them gone then sees the mark, or another definition, or none.
func (s *Source) judge(ctx context.Context) (why string) {
	if !s.waits.listed && !s.waits.lost {
		s.remember(s.known().Definition, s.waits.count)
		return ""
	}
	if !s.learned {
		r, err := s.loadRecord(ctx)
		if err != nil {
			return err.Error()
		}
		s.learned = true
		s.remember(r.Definition, r.Policies)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	d, err := s.conf.Client.Resource(definition.Resource).Get(ctx, definition.Name, meta.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Sprintf("the definition %q is gone, and the policies with it", definition.Name)
	case apierrors.IsForbidden(err):
		return fmt.Sprintf("the CA may not get customresourcedefinitions.apiextensions.k8s.io %q, and cannot tell policies that were deleted from ones that their definition took along; give its ServiceAccount that permission: %v", definition.Name, err)
	case err != nil:
		return fmt.Sprintf("whether policies were deleted by themselves, or with the definition %q, cannot be told: %v", definition.Name, err)
	case d.GetDeletionTimestamp() != nil:
		return fmt.Sprintf("the definition %q is being deleted, and the policies with it", definition.Name)
	}
	return s.judgeDefinition(d)
}

// judgeDefinition compares the definition with the one under which policies were
// known last.
func (s *Source) judgeDefinition(d *unstructured.Unstructured) (why string) {
	last := s.known()
	uid := string(d.GetUID())
	if last.Definition != "" && last.Definition != uid && s.waits.count < last.Policies && d.GetAnnotations()[AcceptAnnotation] != uid {
		return fmt.Sprintf("the definition %q was replaced, and of %d policies there are %d; apply the others again, or say that they are meant to be gone: kubectl annotate --overwrite crd %s %s=%s",
			definition.Name, last.Policies, s.waits.count, definition.Name, AcceptAnnotation, uid)
	}
	s.remember(uid, s.waits.count)
	return ""
}
