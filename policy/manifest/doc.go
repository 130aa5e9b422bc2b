// Package manifest reads Kubernetes objects as people write them, in YAML or
// JSON, and judges PeerAuthentications as the API server and Istio's webhook
// would.
//
// [Parse] is its one entry; what it finds is in [Contents]. Of the many kinds of
// objects it reads three, and of Pods and Services only what a policy can be
// about. It opens no file and decides no mode; that is package policy.
package manifest
