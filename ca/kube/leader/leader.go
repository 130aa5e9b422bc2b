package leader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/go-logr/logr"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"
)

// DefaultLease is the lease of the CA's replicas.
const DefaultLease = "meshca-leader"

// How long a lease holds, and within which time it must be renewed, or lost.
const (
	duration = 15 * time.Second
	renewal  = 10 * time.Second
	retry    = 2 * time.Second
)

// Config says which lease to run for.
type Config struct {
	Client    kubernetes.Interface // required
	Namespace string               // required
	Lease     string               // empty means [DefaultLease]
	Replica   string               // required: this replica's name, such as its pod's
	Log       *slog.Logger         // nil means no log
}

// Run calls work whenever this replica leads, with a context that ends when it
// does no more, and waits for work to return. It runs for the lease again until
// ctx is done or work returns an error that is not due to its context.
func Run(ctx context.Context, c Config, work func(context.Context) error) error {
	if c.Client == nil || c.Namespace == "" || c.Replica == "" {
		return errors.New("running for the lease: Client, Namespace and Replica must all be given")
	}
	if c.Lease == "" {
		c.Lease = DefaultLease
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	for ctx.Err() == nil {
		if err := term(ctx, c, work); err != nil {
			return err
		}
	}
	return nil
}

// term is one attempt to lead, and leading.
func term(ctx context.Context, c Config, work func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The elector's own log, which tells of missing permissions, goes where ours goes.
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(c.Log.Handler()))
	// The elector starts its callback in a goroutine that it does not wait for, so
	// nothing is done in there.
	leading := make(chan context.Context, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Name: c.Lease,
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: c.Namespace, Name: c.Lease},
			Client:     c.Client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: c.Replica},
		},
		LeaseDuration: duration, RenewDeadline: renewal, RetryPeriod: retry, ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) { leading <- ctx },
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return fmt.Errorf("running for the lease %s in namespace %q: %w", c.Lease, c.Namespace, err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		elector.Run(ctx)
	}()
	defer func() {
		cancel() // gives the lease up, so that another replica leads at once
		<-ended
	}()
	select {
	case <-ended:
		return nil
	case term := <-leading:
		c.Log.Info("leading", "lease", c.Lease)
		defer c.Log.Info("leading no more", "lease", c.Lease)
		if err := work(term); err != nil && term.Err() == nil {
			return err
		}
		return nil
	}
}
