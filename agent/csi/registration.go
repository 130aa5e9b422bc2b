package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registry is our side of the kubelet's registration: it finds the socket, asks
// who we are, and says what came of it; again whenever it has restarted.
type registry struct {
	registration.UnimplementedRegistrationServer
	endpoint string // the socket for the calls, as the kubelet sees it
	log      *slog.Logger

	mu         sync.Mutex
	registered bool
	refused    string // the kubelet's words when it would not have us
}

func (r *registry) register(g *grpc.Server) { registration.RegisterRegistrationServer(g, r) }

// GetInfo says that we are a CSI plugin, and where.
func (r *registry) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: DriverName, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"},
	}, nil
}

// NotifyRegistrationStatus takes note of what the kubelet made of us. It tries
// again by itself.
func (r *registry) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	r.mu.Lock()
	r.registered, r.refused = s.GetPluginRegistered(), s.GetError()
	r.mu.Unlock()
	if s.GetPluginRegistered() {
		r.log.Info("registered by the kubelet", "driver", DriverName)
	} else {
		r.log.Error("the kubelet does not register this plugin", "driver", DriverName, "reason", fmt.Sprintf("%.512q", s.GetError()))
	}
	return &registration.RegistrationStatusResponse{}, nil
}

func (r *registry) ready() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.registered:
		return nil
	case r.refused != "":
		return fmt.Errorf("the kubelet does not register %s: %.512q", DriverName, r.refused)
	}
	return errors.New("the kubelet has not registered " + DriverName + " yet; is plugins_registry in --kubelet-dir the kubelet's own?")
}
