package csi

import (
	"context"
	"fmt"
	"net"
	"path"
	"runtime/debug"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// What one message or connection of the kubelet may be. A request holds the
// tokens of the pod and the attributes that its author wrote.
const (
	maxMessage = 64 << 10
	maxHeader  = 16 << 10
	maxStreams = 1000 // it starts many pods at once
)

// connectTimeout bounds the time in which a new connection must have spoken
// HTTP/2.
const connectTimeout = 5 * time.Second

// serve serves one of the sockets for the kubelet until ctx ends.
func (p *Plugin) serve(ctx context.Context, l net.Listener, register func(*grpc.Server)) error {
	g := grpc.NewServer(
		grpc.Creds(insecure.NewCredentials()), // the socket's permissions protect it
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeader),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.UnaryInterceptor(p.intercept),
		grpc.WaitForHandlers(true),
	)
	register(g)
	var stopping sync.WaitGroup
	done := make(chan struct{})
	stopping.Go(func() {
		select {
		case <-ctx.Done():
			g.Stop()
		case <-done:
		}
	})
	err := g.Serve(l)
	close(done)
	stopping.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serving the kubelet on %s: %w", l.Addr(), err)
}

// register adds the services of a CSI node plugin.
func (p *Plugin) register(g *grpc.Server) {
	csi.RegisterIdentityServer(g, &identityService{p: p})
	csi.RegisterNodeServer(g, &node{Plugin: p})
}

// intercept counts calls, and keeps a panic in one from the pods of all others.
// It never looks into a request: there are tokens in it (V56).
func (p *Plugin) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	method := path.Base(info.FullMethod)
	defer func() {
		if r := recover(); r != nil {
			p.conf.Log.Error("a call of the kubelet ended in a panic; this is a bug, please report it",
				"method", method, "panic", fmt.Sprintf("%.256q", fmt.Sprint(r)), "stack", string(debug.Stack()))
			resp, err = nil, status.Error(codes.Internal, "internal error; the agent's log has its stack")
		}
		code := status.Code(err)
		p.metrics.calls.WithLabelValues(method, code.String()).Inc()
		if err != nil {
			p.conf.Log.Warn("a call of the kubelet was refused", "method", method, "code", code.String(), "reason", status.Convert(err).Message())
		}
	}()
	return next(ctx, req)
}

// identityService tells who we are.
type identityService struct {
	csi.UnimplementedIdentityServer
	p *Plugin
}

// GetPluginInfo names the plugin.
func (s *identityService) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: DriverName, VendorVersion: s.p.conf.Version}, nil
}

// GetPluginCapabilities says that there is no controller.
func (*identityService) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{}, nil
}

// Probe says that calls are taken, whatever the CA does.
func (*identityService) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

// node serves the calls about volumes.
type node struct {
	csi.UnimplementedNodeServer
	*Plugin
}

// NodeGetCapabilities says that volumes need no staging and have no statistics.
func (*node) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	return &csi.NodeGetCapabilitiesResponse{}, nil
}

// NodeGetInfo names the node, which the kubelet asks for when it registers us.
func (n *node) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	name, err := n.conf.Host.Node()
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &csi.NodeGetInfoResponse{NodeId: name}, nil
}
