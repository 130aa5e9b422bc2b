package csi_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
	istioca "istio.io/api/security/v1alpha1"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/agent/caclient/caclienttest"
	"github.com/meshca/meshca/identity/identitytest"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/sds/client"
	"github.com/meshca/meshca/wire"
	"github.com/meshca/meshca/wire/meshcav1"
)

// The whole way of a policy: a CA's stream, to which the agent adds a pod that
// the CA learns of later, then the pod's socket, then a proxy's source. Two pods
// of one account have each their own.
func TestPolicyReachesThePodsSocket(t *testing.T) {
	w := newWorld(t)
	ca := caclienttest.New(t, identitytest.ID(t, "spiffe://cluster.local/ns/shop/sa/cart-1"))
	ca.OnSign = func(token string, req *istioca.IstioCertificateRequest) (*istioca.IstioCertificateResponse, error) {
		c, err := caclient.ReadClaims(token)
		if err != nil {
			return nil, err
		}
		return ca.SignAs(identitytest.ID(t, "spiffe://cluster.local/ns/"+c.Namespace+"/sa/"+c.ServiceAccount), req)
	}
	seen := make(chan struct{}) // closed when the CA has learned of the pods
	ca.OnStream = func(s *caclienttest.Stream) error { return serveByName(ca, s, seen) }
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	ca.Serve(l, ca.TLS(caName))
	w.node.CA, w.node.Anchor = l.Addr().String(), ca.AnchorFile()
	i := w.start()

	mode := func(p pod) *client.PolicySource {
		dir, err := os.Open(w.target(p))
		check(t, err)
		t.Cleanup(func() { _ = dir.Close() })
		source, err := client.NewPolicy(client.Config{
			Socket: filepath.Join("/proc/self/fd", itoa(dir.Fd()), "agent.sock"), Log: slog.New(slog.NewTextHandler(&w.log, nil)),
		})
		check(t, err)
		background(t, source.Run)
		return source
	}
	one, other := w.pod(1), w.pod(11) // of one account
	w.publish(i, one)
	w.publish(i, other)
	eventually(t, "told that the CA has not seen the pods", func() bool { return w.log.has("does not know this workload yet") })
	first, second := mode(one), mode(other)
	close(seen)
	for p, source := range map[pod]*client.PolicySource{one: first, other: second} {
		eventually(t, "with a policy", func() bool { _, err := source.Policy(); return err == nil })
		got, err := source.Policy()
		check(t, err)
		if want := portOf(p.uid); got.Mode != policy.Strict || got.ForPort(want) != policy.Permissive {
			t.Errorf("pod %s has %v, port %d %v", p.name, got.Mode, want, got.ForPort(want))
		}
	}
}

// portOf is the port on which a pod's policy is another, so that each policy
// tells whose it is.
func portOf(uid string) uint16 {
	var n uint16
	_, _ = fmt.Sscanf(uid[len(uid)-4:], "%d", &n) // our UIDs end in digits
	return 9000 + n
}

// serveByName is a CA that answers names with what it has: nothing until seen is
// closed, but for the agent's own pod, then a policy for each pod.
func serveByName(ca *caclienttest.CA, s *caclienttest.Stream, seen <-chan struct{}) error {
	requests := make(chan *discovery.DeltaDiscoveryRequest)
	go func() {
		defer close(requests)
		for {
			req, err := s.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- req:
			case <-s.Context().Done():
				return
			}
		}
	}()
	names, pending, nonce := map[string]bool{}, s.First.GetResourceNamesSubscribe(), 0
	answer := func(known bool, names ...string) error {
		for _, name := range names {
			nonce++
			resp := &discovery.DeltaDiscoveryResponse{TypeUrl: wire.TypeURL, Nonce: fmt.Sprint(nonce)}
			if !known {
				resp.RemovedResources = []string{name}
			} else {
				r, err := resourceOf(ca, name)
				if err != nil {
					return err
				}
				resp.Resources = []*discovery.Resource{r}
			}
			if err := s.Send(resp); err != nil {
				return err
			}
		}
		return nil
	}
	known := false
	for {
		for _, name := range pending {
			names[name] = true
		}
		if err := answer(known, pending...); err != nil {
			return err
		}
		pending = nil
		select {
		case req, ok := <-requests:
			if !ok {
				return nil
			}
			if d := req.GetErrorDetail(); d != nil {
				return errors.New(d.GetMessage())
			}
			pending = req.GetResourceNamesSubscribe()
		case <-seen:
			seen, known = nil, true
			for name := range names {
				pending = append(pending, name)
			}
		}
	}
}

func resourceOf(ca *caclienttest.CA, name string) (*discovery.Resource, error) {
	w := ca.Workload(3)
	w.Policy = &meshcav1.Policy{
		Version: 3, Mode: meshcav1.Mode_MODE_STRICT, Source: &meshcav1.Source{Level: "mesh", Namespace: "meshca-system", Name: "default"},
		PortsSource: &meshcav1.Source{Level: "port", Namespace: "shop", Name: "cart"},
		Ports:       []*meshcav1.Port{{Number: uint32(portOf(name)), Mode: meshcav1.Mode_MODE_PERMISSIVE}},
	}
	content, err := anypb.New(w)
	return &discovery.Resource{Name: name, Version: "3-" + name, Resource: content}, err
}
