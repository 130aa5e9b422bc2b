package sds

import (
	"encoding/pem"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

var update = flag.Bool("update", false, "write the golden files anew")

// recorder holds a conversation and writes it down.
type recorder struct {
	strings.Builder
}

func (r *recorder) note(format string, args ...any) { fmt.Fprintf(r, format+"\n", args...) }

// quiet waits until nobody has anything more to do, and notes silence.
func (r *recorder) quiet(k *kit, before float64, kind string) {
	synctest.Wait()
	if k.metric("meshca_sds_responses_total", kind, "sent") == before {
		r.note("  (nothing)")
	}
}

func describe(t testing.TB, a *anypb.Any) string {
	t.Helper()
	var s tlsv3.Secret
	if err := a.UnmarshalTo(&s); err != nil {
		t.Fatal(err)
	}
	blocks := func(d *corev3.DataSource) string {
		var types []string
		for rest := d.GetInlineBytes(); len(rest) > 0; {
			var b *pem.Block
			if b, rest = pem.Decode(rest); b == nil {
				t.Fatalf("%s: not PEM", s.GetName())
			}
			types = append(types, b.Type)
		}
		return strings.Join(types, "+")
	}
	if c := s.GetTlsCertificate(); c != nil {
		return fmt.Sprintf("%s: chain %s, key %s", s.GetName(), blocks(c.GetCertificateChain()), blocks(c.GetPrivateKey()))
	}
	if ca := s.GetValidationContext().GetTrustedCa(); ca != nil {
		return fmt.Sprintf("%s: trusted_ca %s", s.GetName(), blocks(ca))
	}
	var conf tlsv3.SPIFFECertValidatorConfig
	if err := s.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(&conf); err != nil {
		t.Fatal(err)
	}
	text := s.GetName() + ": " + s.GetValidationContext().GetCustomValidatorConfig().GetName()
	for _, d := range conf.GetTrustDomains() {
		text += fmt.Sprintf(" %s=%s", d.GetName(), blocks(d.GetTrustBundle()))
	}
	return text
}

func (r *recorder) sotwRecv(t testing.TB, s secretservice.SecretDiscoveryService_StreamSecretsClient) {
	t.Helper()
	m := recv(t, s)
	r.note("< version %s, nonce %s, %s", m.GetVersionInfo(), m.GetNonce(), m.GetTypeUrl())
	for _, res := range m.GetResources() {
		r.note("    %s", describe(t, res))
	}
}

func (r *recorder) deltaRecv(t testing.TB, s secretservice.SecretDiscoveryService_DeltaSecretsClient) {
	t.Helper()
	m := recv(t, s)
	r.note("< nonce %s, system version %s, %s", m.GetNonce(), m.GetSystemVersionInfo(), m.GetTypeUrl())
	for _, res := range m.GetResources() {
		r.note("    %s@%s = %s", res.GetName(), res.GetVersion(), describe(t, res.GetResource()))
	}
	for _, name := range m.GetRemovedResources() {
		r.note("    removed %s", name)
	}
}

func (r *recorder) compare(t *testing.T, name string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(r.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if r.String() != string(want) {
		t.Errorf("the conversation differs from %s (run with -update if that is meant):\n%s", path, r)
	}
}

func TestRecordedStateOfTheWorld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		var r recorder
		x := k.sotw(inTime(t))
		ask := func(what, nonce string, detail *rpcstatus.Status, names ...string) {
			r.note("# %s\n> nonce %q, names %q", what, nonce, names)
			synctest.Wait()
			before := k.metric("meshca_sds_responses_total", "sds_sotw", "sent")
			req := sotwRequest(nonce, names...)
			req.ErrorDetail = detail
			sendSotW(t, x, req)
			r.quiet(k, before, "sds_sotw")
		}
		ask("before there is anything", "", nil, "default", "ROOTCA", "nope")
		r.note("# the first SVID and bundle")
		s := k.ready()
		r.sotwRecv(t, x)
		ask("ACK", "1", nil, "default", "ROOTCA", "nope")
		r.note("# a renewed SVID")
		s.SVID = k.svid()
		k.feed.Publish(s)
		r.sotwRecv(t, x)
		ask("NACK", "2", &rpcstatus.Status{Code: 13, Message: "no"}, "default", "ROOTCA", "nope")
		r.note("# a new bundle")
		s.Bundle = newBundle(t, k.ca, 2, k.ca.NewIntermediate(t, nil, identitytestKey(t)).Certificate)
		k.feed.Publish(s)
		r.sotwRecv(t, x)
		ask("stale", "2", nil, "ALL")
		ask("ACK and one name more", "3", nil, "default", "ROOTCA", "ALL")
		r.sotwRecv(t, x)
		ask("ACK and another's name", "4", nil, "default", payID)
		ask("no name left", "4", nil)
		r.compare(t, "sotw.golden")
		for result, want := range map[string]float64{"sent": 4, "acknowledged": 3, "rejected": 1, "stale": 1} {
			if got := k.metric("meshca_sds_responses_total", "sds_sotw", result); got != want {
				t.Errorf("metric: %v %s, want %v", got, result, want)
			}
		}
	})
}

func TestRecordedDelta(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		var r recorder
		x := k.delta(inTime(t))
		ask := func(what string, req *discovery.DeltaDiscoveryRequest) {
			r.note("# %s\n> nonce %q, subscribe %q, unsubscribe %q", what,
				req.GetResponseNonce(), req.GetResourceNamesSubscribe(), req.GetResourceNamesUnsubscribe())
			synctest.Wait()
			before := k.metric("meshca_sds_responses_total", "sds_delta", "sent")
			if err := x.Send(req); err != nil {
				t.Fatal(err)
			}
			r.quiet(k, before, "sds_delta")
		}
		ack := func(nonce string) *discovery.DeltaDiscoveryRequest {
			return &discovery.DeltaDiscoveryRequest{ResponseNonce: nonce}
		}
		ask("a wildcard", subscribe("*"))
		ask("before there is anything", subscribe("default", "spiffe://example.org", "nope"))
		r.deltaRecv(t, x)
		ask("ACK", ack("1"))
		r.note("# the first SVID and bundle")
		s := k.ready()
		r.deltaRecv(t, x)
		ask("ACK", ack("2"))
		r.note("# a renewed SVID")
		s.SVID = k.svid()
		k.feed.Publish(s)
		r.deltaRecv(t, x)
		nack := ack("3")
		nack.ErrorDetail = &rpcstatus.Status{Code: 13, Message: "no"}
		ask("NACK", nack)
		ask("another's name", subscribe(payID))
		r.deltaRecv(t, x)
		ask("subscribed again", subscribe("default"))
		r.deltaRecv(t, x)
		ask("unsubscribed", &discovery.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"default"}})
		r.note("# no SVID any more, and a new bundle")
		k.feed.Publish(State{Bundle: newBundle(t, k.ca, 2)})
		r.deltaRecv(t, x)
		ask("the SVID's name while there is none", subscribe("default"))
		r.note("# an SVID again")
		k.feed.Publish(State{SVID: s.SVID, Bundle: newBundle(t, k.ca, 2)})
		r.deltaRecv(t, x)
		r.compare(t, "delta.golden")
	})
}
