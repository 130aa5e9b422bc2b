package check

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sync/errgroup"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/kube/policies/definition"
	"github.com/meshca/meshca/ca/kube/rights"
	"github.com/meshca/meshca/ca/kube/state"
	"github.com/meshca/meshca/ca/kube/trust"
	"github.com/meshca/meshca/ca/kube/volumes"
)

// questions is how many reviews are asked for at a time.
const questions = 8

// reads is what this check itself wants to read.
func (r *run) reads() []rights.Right {
	ns := r.Namespace
	all := []rights.Right{
		{Verb: "list", Resource: "pods"},
		{Verb: "list", Resource: "nodes"},
		{Verb: "list", Resource: "namespaces"},
		{Verb: "list", Group: "coordination.k8s.io", Resource: "leases", Namespace: corev1.NamespaceNodeLease},
		{Verb: "get", Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions", Name: definition.Name},
	}
	if r.phase == Before {
		return all
	}
	return append(all,
		rights.Right{Verb: "get", Resource: "configmaps", Namespace: ns, Name: state.StateName},
		rights.Right{Verb: "get", Resource: "secrets", Namespace: ns, Name: state.SecretName(1)},
		rights.Right{Verb: "list", Resource: "configmaps", Name: trust.ConfigMapName},
		rights.Right{Verb: "get", Group: "storage.k8s.io", Resource: "csidrivers", Name: volumes.Driver},
		rights.Right{Verb: "list", Group: "storage.k8s.io", Resource: "csinodes"},
		rights.Right{Verb: "create", Group: "authorization.k8s.io", Resource: "subjectaccessreviews"},
	)
}

func attributes(r rights.Right) (*authorizationv1.ResourceAttributes, *authorizationv1.NonResourceAttributes) {
	if r.URL != "" {
		return nil, &authorizationv1.NonResourceAttributes{Path: r.URL, Verb: r.Verb}
	}
	resource, sub, _ := strings.Cut(r.Resource, "/")
	return &authorizationv1.ResourceAttributes{
		Verb: r.Verb, Group: r.Group, Resource: resource, Subresource: sub, Namespace: r.Namespace, Name: r.Name,
	}, nil
}

// refused asks about each right and returns those that are not there, in order.
func refused(ctx context.Context, all []rights.Right, ask func(context.Context, rights.Right) (*authorizationv1.SubjectAccessReviewStatus, error)) ([]string, error) {
	allowed := make([]bool, len(all))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(questions)
	for i, right := range all {
		g.Go(func() error {
			status, err := ask(ctx, right)
			if err != nil {
				return fmt.Errorf("asking who may %s: %w", right, err)
			}
			if !status.Allowed && status.EvaluationError != "" {
				return fmt.Errorf("asking who may %s: %w", right, errors.New(status.EvaluationError))
			}
			allowed[i] = status.Allowed
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var lacks []string
	for i, right := range all {
		if !allowed[i] {
			lacks = append(lacks, right.String())
		}
	}
	return lacks, nil
}

// permissions are those of whoever asks. What is missing here is what the others
// below cannot tell.
func (r *run) permissions(ctx context.Context) Result {
	all := r.reads()
	lacks, err := refused(ctx, all, func(ctx context.Context, right rights.Right) (*authorizationv1.SubjectAccessReviewStatus, error) {
		review := new(authorizationv1.SelfSubjectAccessReview)
		review.Spec.ResourceAttributes, review.Spec.NonResourceAttributes = attributes(right)
		answer, err := r.client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
		if err != nil {
			return nil, err
		}
		return &answer.Status, nil
	})
	if err != nil {
		return unknown(err)
	}
	if len(lacks) > 0 {
		return Result{Status: Unknown, Found: fmt.Sprintf("you lack %d of %d; what they are for could not be told", len(lacks), len(all)),
			Next: "ask as somebody who has them (--context), or have them given to you"}.about(lacks)
	}
	return holds("all %d are there", len(all))
}

// rights are those of the CA's ServiceAccount, as the API server itself sees them,
// whichever roles they come from.
func (r *run) rights(ctx context.Context) Result {
	s, err := r.readSettings(ctx)
	if err != nil {
		return unknown(err)
	}
	all := rights.CA(rights.Options{
		Namespace: r.Namespace, TokenReview: s.Kubernetes.Callers == "tokenreview", IstioCompatibility: s.Kubernetes.IstioCompatibility,
		Upstream: len(s.Upstream) > 0,
	})
	user := "system:serviceaccount:" + r.Namespace + ":meshca"
	groups := []string{"system:serviceaccounts", "system:serviceaccounts:" + r.Namespace, "system:authenticated"}
	lacks, err := refused(ctx, all, func(ctx context.Context, right rights.Right) (*authorizationv1.SubjectAccessReviewStatus, error) {
		review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{User: user, Groups: groups}}
		review.Spec.ResourceAttributes, review.Spec.NonResourceAttributes = attributes(right)
		answer, err := r.client.AuthorizationV1().SubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
		if err != nil {
			return nil, err
		}
		return &answer.Status, nil
	})
	if err != nil {
		return unknown(err)
	}
	if len(lacks) > 0 {
		return broken("apply the manifest or upgrade the release again: its ClusterRole and Role meshca have them",
			"ServiceAccount %s/meshca lacks %d of %d", r.Namespace, len(lacks), len(all)).about(lacks)
	}
	return holds("all %d are there", len(all))
}
