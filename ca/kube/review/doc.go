// Package review has tokens judged by the API server: a [Reviewer] asks for a
// TokenReview of each. It costs a request per certificate, and what it gains over
// verifying tokens by their keys is that the API server's own mind counts; see
// package kube/pods for how the same is had without.
//
// The API server's yes alone is not believed. Its answer must be for our audience,
// without an error beside the yes, and about the ServiceAccount, the pod and the
// node that the token itself names. The claims are judged by package token as all
// others are.
//
// It uses one permission, of the whole cluster:
//
//	resource                            verbs
//	tokenreviews.authentication.k8s.io  create
package review
