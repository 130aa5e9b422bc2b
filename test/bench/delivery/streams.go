package delivery

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/meshca/meshca/identity"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// opening is how many streams are opened at the same time.
const opening = 16

// receive waits for the next message of a stream, and returns the roots in it as they
// are there: DER, one after the other, or PEM; empty if there are none.
type receive func() (roots []byte, err error)

// kinds of streams that each workload has: those of two programs, of one that only
// verifies others, and of an Envoy.
var kinds = []func(context.Context, *grpc.ClientConn) (receive, error){svids, svids, bundles, secrets}

func workloadAPI(ctx context.Context, conn *grpc.ClientConn) (context.Context, workload.SpiffeWorkloadAPIClient) {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"), workload.NewSpiffeWorkloadAPIClient(conn)
}

func svids(ctx context.Context, conn *grpc.ClientConn) (receive, error) {
	ctx, api := workloadAPI(ctx, conn)
	stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	return func() ([]byte, error) {
		resp, err := stream.Recv()
		if err == nil && len(resp.GetSvids()) != 1 {
			err = fmt.Errorf("%d SVIDs came, want 1", len(resp.GetSvids()))
		}
		if err != nil {
			return nil, fmt.Errorf("receiving SVIDs: %w", err)
		}
		return resp.GetSvids()[0].GetBundle(), nil
	}, err
}

func bundles(ctx context.Context, conn *grpc.ClientConn) (receive, error) {
	ctx, api := workloadAPI(ctx, conn)
	stream, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	return func() ([]byte, error) {
		resp, err := stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("receiving bundles: %w", err)
		}
		var roots []byte
		for _, b := range resp.GetBundles() {
			roots = append(roots, b...)
		}
		return roots, nil
	}, err
}

// secrets acknowledges what comes, as Envoy does.
func secrets(ctx context.Context, conn *grpc.ClientConn) (receive, error) {
	stream, err := secretservice.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		return nil, err
	}
	ask := &discovery.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default", "ROOTCA"}}
	return func() (roots []byte, err error) {
		resp, err := stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("receiving secrets: %w", err)
		}
		for _, r := range resp.GetResources() {
			var secret tlsv3.Secret
			if err := r.UnmarshalTo(&secret); err != nil {
				return nil, fmt.Errorf("reading a secret: %w", err)
			}
			roots = append(roots, secret.GetValidationContext().GetTrustedCa().GetInlineBytes()...)
		}
		ask.VersionInfo, ask.ResponseNonce = resp.GetVersionInfo(), resp.GetNonce()
		return roots, stream.Send(ask)
	}, stream.Send(ask)
}

// first opens a stream on a connection of its own and waits for what it brings first.
func first(ctx context.Context, s *socket, kind func(context.Context, *grpc.ClientConn) (receive, error)) (*grpc.ClientConn, receive, error) {
	conn, err := s.dial()
	if err != nil {
		return nil, nil, err
	}
	next, err := kind(ctx, conn)
	if err == nil {
		var roots []byte
		if roots, err = next(); err == nil && len(roots) == 0 {
			err = errors.New("the first message of a stream brought no roots")
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return conn, next, nil
}

// connects is how many streams were opened, each by the next of the workloads.
type connects struct {
	volumes []*socket
	next    atomic.Int64
}

// run opens n streams, some at once, and closes each when it has brought an answer.
// Took is told how long that answer took, from before there was a connection; it may be
// nil.
func (c *connects) run(ctx context.Context, n, atOnce int, took func(time.Duration)) error {
	var left atomic.Int64
	left.Store(int64(n))
	group, ctx := errgroup.WithContext(ctx)
	for range atOnce {
		group.Go(func() error {
			for left.Add(-1) >= 0 && ctx.Err() == nil {
				if err := c.one(ctx, took); err != nil {
					return err
				}
			}
			return ctx.Err()
		})
	}
	return group.Wait()
}

func (c *connects) one(ctx context.Context, took func(time.Duration)) error {
	s := c.volumes[int(c.next.Add(1))%len(c.volumes)]
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	began := time.Now()
	conn, _, err := first(ctx, s, svids)
	if err != nil {
		return err
	}
	if took != nil {
		took(time.Since(began))
	}
	return conn.Close()
}

// streams are open, and read until they are closed.
type streams struct {
	cancel  context.CancelFunc
	readers sync.WaitGroup
	count   int
	awaited atomic.Pointer[change]
	failed  chan error // holds the first error of a stream

	mu    sync.Mutex
	conns []*grpc.ClientConn
}

// openStreams opens all streams of all workloads, and returns when each has brought
// something.
func openStreams(ctx context.Context, volumes []*socket) (*streams, error) {
	s := &streams{failed: make(chan error, 1), count: len(volumes) * len(kinds)}
	// Not the group's: streams outlive their opening.
	var reading context.Context
	reading, s.cancel = context.WithCancel(ctx)
	var group errgroup.Group
	group.SetLimit(opening)
	for _, v := range volumes {
		for _, kind := range kinds {
			group.Go(func() error {
				conn, next, err := first(reading, v, kind)
				if err != nil {
					s.cancel() // the others need not be opened
					return err
				}
				s.mu.Lock()
				defer s.mu.Unlock()
				s.conns = append(s.conns, conn)
				s.readers.Go(func() { s.read(reading, next) })
				return nil
			})
		}
	}
	if err := group.Wait(); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// read reads one stream until ctx ends.
func (s *streams) read(ctx context.Context, next receive) {
	var seen *change
	for {
		roots, err := next()
		at := time.Now()
		if err != nil {
			if ctx.Err() == nil {
				select {
				case s.failed <- err:
				default:
				}
			}
			return
		}
		if c := s.awaited.Load(); c != nil && c != seen && c.in(roots) {
			seen = c
			c.arrived(at)
		}
	}
}

// close ends all streams. One that had ended by itself is an error: what was measured
// was without it.
func (s *streams) close() error {
	s.cancel()
	s.readers.Wait()
	var errs []error
	select {
	case err := <-s.failed:
		errs = append(errs, err)
	default:
	}
	for _, c := range s.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// change is a new root that streams are to bring.
type change struct {
	der, pem []byte
	want     int
	all      chan struct{} // closed when all have

	mu sync.Mutex
	at []time.Time // when each did
}

// await has the arrivals of a root noted.
func (s *streams) await(root *x509.Certificate) *change {
	c := &change{der: root.Raw, pem: identity.EncodePEM(root), want: s.count, all: make(chan struct{})}
	s.awaited.Store(c)
	return c
}

func (c *change) in(roots []byte) bool {
	return bytes.Contains(roots, c.der) || bytes.Contains(roots, c.pem)
}

func (c *change) arrived(at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at = append(c.at, at); len(c.at) == c.want {
		close(c.all)
	}
}

// wait waits until the root is at every stream, and returns when it came to each.
func (s *streams) wait(ctx context.Context, c *change) ([]time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	select {
	case <-c.all:
		return c.at, nil
	case err := <-s.failed:
		return nil, fmt.Errorf("waiting for a new root at every stream: %w", err)
	case <-ctx.Done():
		c.mu.Lock()
		defer c.mu.Unlock()
		return nil, fmt.Errorf("waiting for a new root at every stream: %w; %d of %d have it", context.Cause(ctx), len(c.at), c.want)
	}
}
