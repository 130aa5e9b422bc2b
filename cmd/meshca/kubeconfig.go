package main

import (
	"errors"
	"net/url"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/meshca/meshca/cmd/internal/cli"
)

// clusterFlags say which cluster a command speaks to, and as whom: the person's
// own kubeconfig, as kubectl reads it.
type clusterFlags struct{ kubeconfig, context, namespace string }

func (f *clusterFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.kubeconfig, "kubeconfig", "", "the file that says how to reach the cluster (as for kubectl: $KUBECONFIG, else ~/.kube/config)")
	c.Flags().StringVar(&f.context, "context", "", "the context in that file (its current one)")
	c.Flags().StringVarP(&f.namespace, "namespace", "n", "meshca-system", "the namespace of the CA")
}

// connect returns a client. It connects at the first request.
func (f *clusterFlags) connect() (typedcorev1.CoreV1Interface, error) {
	config, err := f.config()
	if err != nil {
		return nil, err
	}
	return typedcorev1.NewForConfig(config)
}

// config says how to reach the cluster. In a pod without a kubeconfig it is the
// pod's own, as for kubectl.
func (f *clusterFlags) config() (*rest.Config, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = f.kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules,
		&clientcmd.ConfigOverrides{CurrentContext: f.context}).ClientConfig()
	if err != nil {
		return nil, cli.Usagef("reading how to reach the cluster: %w; give --kubeconfig and --context", err)
	}
	config.Timeout = 30 * time.Second
	config.UserAgent = "meshca/" + cli.Version()
	// A command is one person's, and the API server has fairness of its own; five a
	// second, the client's default, would make a minute of what takes seconds.
	config.QPS, config.Burst = 50, 100
	return config, nil
}

// unreadable marks an error of the API server, or on the way to it, as one by which
// nothing could be told.
func unreadable(err error) error {
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		return &cli.UnknownError{Err: &cli.HintError{Err: err, Hint: "ask as somebody who may (--context)"}}
	}
	var network *url.Error
	if errors.As(err, &network) {
		return &cli.UnknownError{Err: &cli.HintError{Err: err, Hint: "is the cluster up, and is it the one of --kubeconfig and --context?"}}
	}
	return err
}
