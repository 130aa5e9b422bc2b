// Package e2e installs meshca in the cluster of package cluster, as a user would,
// and looks at it from inside pods, through the kubelet and through the API
// server. Nothing in it is simulated: each pod is one, each token is the API
// server's, each volume was published by the kubelet.
//
// The cluster must be up; `make e2e` sees to that and leaves it up.
package e2e
