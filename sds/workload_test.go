package sds

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/identity/identitytest"
)

func TestSPIFFE52_SPIFFE53_SVIDResponseIsComplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		s := k.ready()
		partner := identitytest.NewCA(t, identitytest.TrustDomain(t, "partner.test"))
		s.Federated = []*identity.Bundle{newBundle(t, partner, 3)}
		k.feed.Publish(s)
		synctest.Wait()
		got := recv(t, k.fetchSVID(inTime(t)))
		if len(got.GetSvids()) != 1 {
			t.Fatalf("%d SVIDs", len(got.GetSvids()))
		}
		svid := got.GetSvids()[0]
		key, err := x509.ParsePKCS8PrivateKey(svid.GetX509SvidKey())
		if err != nil {
			t.Fatal(err)
		}
		chain, err := x509.ParseCertificates(svid.GetX509Svid())
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := identity.NewSVID(chain, key.(crypto.Signer))
		if err != nil {
			t.Fatal(err)
		}
		if svid.GetSpiffeId() != cartID || parsed.ID().String() != cartID || svid.GetHint() != "" {
			t.Errorf("ID %q, certificate of %s, hint %q", svid.GetSpiffeId(), parsed.ID(), svid.GetHint())
		}
		if !bytes.Equal(svid.GetBundle(), k.ca.Root.Certificate.Raw) {
			t.Error("the bundle is not the own domain's")
		}
		if f := got.GetFederatedBundles(); len(f) != 1 || !bytes.Equal(f["spiffe://partner.test"], partner.Root.Certificate.Raw) {
			t.Errorf("federated bundles: %d", len(f))
		}
	})
}

func TestSPIFFE57_BundlesHoldTheOwnDomain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		partner := identitytest.NewCA(t, identitytest.TrustDomain(t, "partner.test"))
		// There is no SVID yet, and none is needed.
		k.feed.Publish(State{Bundle: newBundle(t, k.ca, 1), Federated: []*identity.Bundle{newBundle(t, partner, 1)}})
		synctest.Wait()
		stream, err := k.workload().FetchX509Bundles(withHeader(inTime(t)), &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		b := recv(t, stream).GetBundles()
		if len(b) != 2 || !bytes.Equal(b["spiffe://example.org"], k.ca.Root.Certificate.Raw) ||
			!bytes.Equal(b["spiffe://partner.test"], partner.Root.Certificate.Raw) {
			t.Errorf("bundles: %d", len(b))
		}
	})
}

func TestSPIFFE49_SPIFFE50_SPIFFE51_FullSetAtOnceAndOnChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		s := k.ready()
		partner := identitytest.NewCA(t, identitytest.TrustDomain(t, "partner.test"))
		s.Federated = []*identity.Bundle{newBundle(t, partner, 1)}
		k.feed.Publish(s)
		synctest.Wait()
		began := time.Now()
		stream := k.fetchSVID(inTime(t))
		first := recv(t, stream)

		s.SVID = k.svid()
		k.feed.Publish(s)
		second := recv(t, stream)
		if bytes.Equal(first.GetSvids()[0].GetX509Svid(), second.GetSvids()[0].GetX509Svid()) {
			t.Error("the renewed SVID did not come")
		}
		if len(second.GetFederatedBundles()) != 1 || len(second.GetSvids()[0].GetBundle()) == 0 {
			t.Error("the second message is not the full set")
		}
		s.Federated = nil // removed: it must vanish at the client
		k.feed.Publish(s)
		if third := recv(t, stream); len(third.GetFederatedBundles()) != 0 || len(third.GetSvids()) != 1 {
			t.Errorf("after the removal: %d federated bundles", len(third.GetFederatedBundles()))
		}
		if passed := time.Since(began); passed != 0 {
			t.Errorf("it took %v", passed)
		}
		k.feed.Publish(s) // the same again: nothing to say
		synctest.Wait()
		if n := k.metric("meshca_sds_responses_total", "x509_svid", "sent"); n != 3 {
			t.Errorf("%v responses were sent", n)
		}
	})
}

func TestSPIFFE45_NoSVIDInTimeIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		began := time.Now()
		for range 2 {
			_, err := k.fetchSVID(inTime(t)).Recv()
			if status.Code(err) != codes.Unavailable {
				t.Errorf("error %v", err)
			}
		}
		if passed := time.Since(began); passed != 10*time.Second {
			t.Errorf("two calls took %v", passed)
		}
	})
}

func TestFirstSVIDComesWhileACallWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		stream := k.fetchSVID(inTime(t))
		time.Sleep(defaultFirstSVIDWait - time.Second)
		k.ready()
		recv(t, stream)
		time.Sleep(time.Minute) // the wait for the first one is over
		if k.metric("meshca_sds_streams", "x509_svid") != 1 {
			t.Error("the stream ended though its SVID is valid")
		}
	})
}

func TestSPIFFE56_DeniedIsPermissionDenied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		s := k.ready()
		open := k.fetchSVID(inTime(t))
		recv(t, open)
		bundles, err := k.workload().FetchX509Bundles(withHeader(inTime(t)), &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		recv(t, bundles)

		s.Denied = errors.New("the CA says: \x1b[31msecret reason")
		k.feed.Publish(s)
		for what, err := range map[string]error{
			"an open SVID stream":    recvError(open),
			"an open bundles stream": recvError(bundles),
			"a new SVID stream":      recvError(k.fetchSVID(inTime(t))),
		} {
			if status.Code(err) != codes.PermissionDenied || strings.Contains(err.Error(), "secret reason") {
				t.Errorf("%s: %v", what, err)
			}
		}
		// Envoy keeps what is still valid.
		x := k.sotw(inTime(t))
		sendSotW(t, x, sotwRequest("", "default"))
		recv(t, x)
		if !strings.Contains(k.log.String(), "secret reason") || strings.Contains(k.log.String(), "\x1b") {
			t.Errorf("the log has not the reason, or has it raw:\n%s", k.log)
		}
	})
}

func recvError[T any](s interface{ Recv() (*T, error) }) error {
	_, err := s.Recv()
	return err
}

func TestExpiredSVIDIsNotHandedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		s := State{SVID: k.svid(identitytest.WithLifetime(10 * time.Minute)), Bundle: newBundle(t, k.ca, 1)}
		k.feed.Publish(s)
		open := k.fetchSVID(inTime(t))
		recv(t, open)
		d := k.delta(inTime(t))
		if err := d.Send(subscribe("default", "ROOTCA")); err != nil {
			t.Fatal(err)
		}
		recv(t, d)

		began := time.Now()
		if err := recvError(open); status.Code(err) != codes.Unavailable {
			t.Errorf("the open stream: %v", err)
		}
		if passed := time.Since(began); passed > 10*time.Minute || passed < 9*time.Minute {
			t.Errorf("the open stream ended after %v", passed)
		}
		expect(t, "delta, removed", recv(t, d).GetRemovedResources(), "default")
		if err := recvError(k.fetchSVID(inTime(t))); status.Code(err) != codes.Unavailable {
			t.Errorf("a new stream: %v", err)
		}
		x := k.sotw(inTime(t))
		sendSotW(t, x, sotwRequest("", "default", "ROOTCA"))
		if got := recv(t, x); len(got.GetResources()) != 1 {
			t.Errorf("state of the world got %d resources, want the bundle alone", len(got.GetResources()))
		}
		if !strings.Contains(k.log.String(), "is no longer handed out") {
			t.Errorf("the log does not say it:\n%s", k.log)
		}
		s.SVID = k.svid()
		k.feed.Publish(s)
		if got := recv(t, d); len(got.GetResources()) != 1 || got.GetResources()[0].GetName() != "default" {
			t.Errorf("after the renewal delta got %v", got.GetResources())
		}
		recv(t, x)
	})
}

// A machine that was suspended wakes with timers that know nothing of it.
func TestWallClockIsAskedEvery30s(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asleep atomic.Int64
		k := start(t, func(c *Config) {
			c.Now = func() time.Time { return time.Now().Add(time.Duration(asleep.Load())) }
		})
		k.ready()
		open := k.fetchSVID(inTime(t))
		recv(t, open)
		synctest.Wait()
		asleep.Store(int64(2 * time.Hour))
		began := time.Now()
		if err := recvError(open); status.Code(err) != codes.Unavailable {
			t.Errorf("error %v", err)
		}
		if passed := time.Since(began); passed > 30*time.Second {
			t.Errorf("the jump was noticed after %v", passed)
		}
	})
}

func TestSPIFFE41_T9_HeaderIsRequired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		vectors := map[string][]string{
			"missing":         nil,
			"True":            {"workload.spiffe.io", "True"},
			"empty":           {"workload.spiffe.io", ""},
			"two values":      {"workload.spiffe.io", "true", "workload.spiffe.io", "true"},
			"true and false":  {"workload.spiffe.io", "true", "workload.spiffe.io", "false"},
			"joined values":   {"workload.spiffe.io", "true, true"},
			"another's":       {"broker.spiffe.io", "true"},
			"trailing letter": {"workload.spiffe.io", "truee"},
		}
		for name, kv := range vectors {
			ctx := metadata.AppendToOutgoingContext(inTime(t), kv...)
			for method, err := range callAll(t, ctx, k.workload()) {
				if status.Code(err) != codes.InvalidArgument {
					t.Errorf("%s, %s: %v", name, method, err)
				}
			}
		}
		recv(t, k.fetchSVID(inTime(t)))
	})
}

// callAll calls every method of the Workload API once.
func callAll(t *testing.T, ctx context.Context, c workload.SpiffeWorkloadAPIClient) map[string]error {
	t.Helper()
	errs := make(map[string]error)
	svid, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	errs["FetchX509SVID"] = recvError(svid)
	bundles, err := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	errs["FetchX509Bundles"] = recvError(bundles)
	_, errs["FetchJWTSVID"] = c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
	jwt, err := c.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	errs["FetchJWTBundles"] = recvError(jwt)
	_, errs["ValidateJWTSVID"] = c.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "b"})
	return errs
}

func TestSPIFFE48_DisabledProfilesAreUnimplemented(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		errs := callAll(t, withHeader(inTime(t)), k.workload())
		for _, method := range []string{"FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID"} {
			if status.Code(errs[method]) != codes.Unimplemented {
				t.Errorf("%s: %v", method, errs[method])
			}
		}
		for _, method := range []string{"FetchX509SVID", "FetchX509Bundles"} {
			if errs[method] != nil {
				t.Errorf("%s: %v", method, errs[method])
			}
		}
	})
}

func TestHealthSaysWhetherThereIsAnSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		check := func(service string, want healthpb.HealthCheckResponse_ServingStatus) {
			t.Helper()
			synctest.Wait()
			got, err := healthpb.NewHealthClient(k.conn).Check(inTime(t), &healthpb.HealthCheckRequest{Service: service})
			if err != nil || got.GetStatus() != want {
				t.Errorf("health of %q: %v, %v; want %v", service, got.GetStatus(), err, want)
			}
		}
		const serving, not = healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING
		check("", not)
		s := k.ready()
		check("", serving)
		check("SpiffeWorkloadAPI", serving)
		check("envoy.service.secret.v3.SecretDiscoveryService", serving)
		s.Denied = errors.New("no")
		k.feed.Publish(s)
		check("SpiffeWorkloadAPI", not)
		check("envoy.service.secret.v3.SecretDiscoveryService", serving)
		k.feed.Publish(State{})
		check("", not)
	})
}

func TestSPIFFE46_Reflection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		stream, err := reflectionpb.NewServerReflectionClient(k.conn).ServerReflectionInfo(inTime(t))
		if err != nil {
			t.Fatal(err)
		}
		err = stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range recv(t, stream).GetListServicesResponse().GetService() {
			names = append(names, s.GetName())
		}
		expect(t, "services", names, "SpiffeWorkloadAPI", "envoy.service.discovery.v3.AggregatedDiscoveryService",
			"envoy.service.secret.v3.SecretDiscoveryService", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection")
	})
}

// SPIFFE_Workload_Endpoint §5: what is not the standard's has a name of its own;
// under the standard's there is nothing else.
func TestSPIFFE47_NothingIsAddedToTheStandard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		for _, method := range []string{"/SpiffeWorkloadAPI/FetchPolicy", "/SpiffeWorkloadAPI/", "/SpiffeWorkloadAPI2/FetchX509SVID"} {
			err := k.conn.Invoke(withHeader(inTime(t)), method, &workload.X509SVIDRequest{}, &workload.X509SVIDResponse{})
			if status.Code(err) != codes.Unimplemented {
				t.Errorf("%s: %v; want Unimplemented", method, err)
			}
		}
	})
}
