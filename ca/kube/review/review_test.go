package review

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/peer"
	authentication "k8s.io/api/authentication/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/identity/token"
	"github.com/meshca/meshca/identity/token/tokenissuer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const issuerURL = "https://issuer.test"

// server is an API server over HTTPS that gives one answer to all reviews.
type server struct {
	answer  func(http.ResponseWriter, *authentication.TokenReview)
	asked   atomic.Int32
	issuer  *tokenissuer.Issuer
	tokens  *token.Verifier
	release chan struct{} // closed at the end
}

func start(t *testing.T, answer func(http.ResponseWriter, *authentication.TokenReview)) *server {
	t.Helper()
	s := &server{answer: answer, release: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /apis/authentication.k8s.io/v1/tokenreviews", func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		body, err := io.ReadAll(r.Body)
		review := new(authentication.TokenReview)
		if err != nil || json.Unmarshal(body, review) != nil {
			t.Errorf("asked: %v %q", err, body)
		}
		s.answer(w, review)
	})
	web := httptest.NewTLSServer(mux)
	t.Cleanup(web.Close)
	t.Cleanup(func() { close(s.release) })
	reviewer, err := New(Config{API: &rest.Config{Host: web.URL, TLSClientConfig: rest.TLSClientConfig{CAData: pemOf(web)}}})
	must(t, err)
	t.Cleanup(reviewer.Close)
	s.issuer, err = tokenissuer.New(tokenissuer.Config{URL: issuerURL})
	must(t, err)
	s.tokens, err = token.New(token.Config{Issuers: []token.Issuer{{
		URL: issuerURL, Review: reviewer, Audiences: map[string]time.Duration{"meshca": time.Hour, "istio-ca": 24 * time.Hour}, RequirePod: true,
	}}})
	must(t, err)
	return s
}

func (s *server) verify(t *testing.T, change func(*tokenissuer.Claims)) (*token.Claims, error) {
	t.Helper()
	c := tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: "cart", ServiceAccountUID: "account-uid", PodName: "cart-0", PodUID: "pod-uid",
		NodeName: "node-1", NodeUID: "node-uid", Audience: []string{"meshca"}, Lifetime: time.Hour,
	}
	if change != nil {
		change(&c)
	}
	raw, err := s.issuer.Issue(c)
	must(t, err)
	return s.tokens.Verify(t.Context(), raw)
}

// from makes the context of a call that comes from an address.
func from(ctx context.Context, ip string) context.Context {
	return peer.NewContext(ctx, &peer.Peer{Addr: &net.TCPAddr{IP: net.ParseIP(ip), Port: 4711}})
}

// Whoever makes claims up spends what its own address has, whatever nodes it names: the
// API server is busy with it, and another address is answered meanwhile.
func TestF22_MadeUpNodesSpendTheirOwn(t *testing.T) {
	var s *server
	s = start(t, func(w http.ResponseWriter, r *authentication.TokenReview) {
		if s.asked.Load() <= int32(limits.PerNode) {
			<-s.release // those of the attack
			return
		}
		yes(nil)(w, r)
	})
	ctx, cancel := context.WithCancel(t.Context())
	var attack sync.WaitGroup
	for i := range 2 * limits.AtOnce {
		raw, err := s.issuer.Issue(tokenissuer.Claims{
			Namespace: "shop", ServiceAccount: "cart", PodName: "cart-0", PodUID: "pod-uid",
			NodeName: fmt.Sprint("node-", i), NodeUID: "node-uid", Audience: []string{"meshca"}, Lifetime: time.Hour,
		})
		must(t, err)
		attack.Go(func() { _, _ = s.tokens.Verify(from(ctx, "10.0.0.66"), raw) })
	}
	for s.asked.Load() < int32(limits.PerNode) {
		runtime.Gosched()
	}
	raw, err := s.issuer.Issue(tokenissuer.Claims{
		Namespace: "shop", ServiceAccount: "cart", ServiceAccountUID: "account-uid", PodName: "cart-0", PodUID: "pod-uid",
		NodeName: "node-1", NodeUID: "node-uid", Audience: []string{"meshca"}, Lifetime: time.Hour,
	})
	must(t, err)
	if _, err := s.tokens.Verify(from(t.Context(), "10.0.0.7"), raw); err != nil {
		t.Errorf("another address: %v", err)
	}
	if n := s.asked.Load(); n != int32(limits.PerNode)+1 {
		t.Errorf("asked %d times; want %d for the one address, and one", n, limits.PerNode)
	}
	cancel()
	attack.Wait()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// yes answers as the API server does for the token of verify.
func yes(change func(*authentication.TokenReviewStatus)) func(http.ResponseWriter, *authentication.TokenReview) {
	return func(w http.ResponseWriter, r *authentication.TokenReview) {
		r.Status = authentication.TokenReviewStatus{
			Authenticated: true, Audiences: []string{"meshca"},
			User: authentication.UserInfo{
				Username: "system:serviceaccount:shop:cart", UID: "account-uid",
				Groups: []string{"system:serviceaccounts"},
				Extra: map[string]authentication.ExtraValue{
					podName: {"cart-0"}, podUID: {"pod-uid"}, nodeName: {"node-1"}, nodeUID: {"node-uid"},
				},
			},
		}
		if change != nil {
			change(&r.Status)
		}
		reply(w, http.StatusCreated, r)
	}
}

func reply(w http.ResponseWriter, code int, o any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(o)
}

func TestReviewed(t *testing.T) {
	var seen authentication.TokenReviewSpec
	s := start(t, func(w http.ResponseWriter, r *authentication.TokenReview) {
		seen = r.Spec
		yes(nil)(w, r)
	})
	claims, err := s.verify(t, nil)
	must(t, err)
	if pod, uid := claims.Pod(); claims.Namespace() != "shop" || pod != "cart-0" || uid != "pod-uid" {
		t.Errorf("claims of %s/%s %s", claims.Namespace(), pod, uid)
	}
	if len(seen.Audiences) != 1 || seen.Audiences[0] != "meshca" || seen.Token == "" {
		t.Errorf("asked for the audiences %q", seen.Audiences)
	}
}

// A yes that contradicts itself, or the token, is no yes.
func TestV57_F27_YesIsNotEnough(t *testing.T) {
	extra := func(key string, values ...string) func(*authentication.TokenReviewStatus) {
		return func(s *authentication.TokenReviewStatus) {
			if values == nil {
				delete(s.User.Extra, key)
				return
			}
			s.User.Extra[key] = values
		}
	}
	type status = authentication.TokenReviewStatus
	tests := map[string]struct {
		change func(*status)
		reason string // empty: taken
	}{
		"no":                         {func(s *status) { *s = status{Error: "invalid bearer token"} }, `does not take it: "invalid bearer token"`},
		"nothing at all":             {func(s *status) { *s = status{} }, "does not take it"},
		"an error beside the yes":    {func(s *status) { s.Error = "the webhook timed out" }, "names an error"},
		"no audiences":               {func(s *status) { s.Audiences = nil }, `not for "meshca"`},
		"empty audiences":            {func(s *status) { s.Audiences = []string{} }, `not for "meshca"`},
		"another audience":           {func(s *status) { s.Audiences = []string{"vault"} }, `not for "meshca"`},
		"another of ours":            {func(s *status) { s.Audiences = []string{"istio-ca"} }, `not for "meshca"`},
		"part of an audience":        {func(s *status) { s.Audiences = []string{"meshca2", "mesh"} }, `not for "meshca"`},
		"another account":            {func(s *status) { s.User.Username = "system:serviceaccount:shop:other" }, "for the user"},
		"another namespace":          {func(s *status) { s.User.Username = "system:serviceaccount:bank:cart" }, "for the user"},
		"a person":                   {func(s *status) { s.User.Username = "admin" }, "for the user"},
		"no user":                    {func(s *status) { s.User = authentication.UserInfo{} }, "for the user"},
		"a name of three parts":      {func(s *status) { s.User.Username = "system:serviceaccount:shop" }, "for the user"},
		"a name of five parts":       {func(s *status) { s.User.Username += ":x" }, "for the user"},
		"a name of formats":          {func(s *status) { s.User.Username = "%s%n%!(EXTRA)\x00\n" }, "for the user"},
		"a name of 1 MB":             {func(s *status) { s.User.Username = strings.Repeat(":", 1<<20) }, "for the user"},
		"the account made anew":      {func(s *status) { s.User.UID = "another" }, `its claims name "account-uid"`},
		"another pod":                {extra(podUID, "another"), podUID},
		"another pod's name":         {extra(podName, "cart-1"), podName},
		"two pods":                   {extra(podUID, "pod-uid", "another"), podUID},
		"no pod":                     {extra(podUID), podUID},
		"no pod's name":              {extra(podName), podName},
		"a pod without a value":      {extra(podName, []string{}...), podName},
		"another node":               {extra(nodeName, "node-2"), nodeName},
		"another node of that name":  {extra(nodeUID, "another"), nodeUID},
		"another token":              {extra(credentialID, "JTI=another"), credentialID},
		"no node, from an older one": {func(s *status) { delete(s.User.Extra, nodeName); delete(s.User.Extra, nodeUID) }, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			claims, err := start(t, yes(tt.change)).verify(t, nil)
			if tt.reason == "" {
				must(t, err)
				return
			}
			var invalid *token.InvalidError
			if claims != nil || !errors.As(err, &invalid) || !strings.Contains(err.Error(), tt.reason) || len(err.Error()) > 2000 {
				t.Errorf("%v, %.2000v; want an InvalidError with %q", claims, err, tt.reason)
			}
		})
	}
}

// What a token is refused for by itself, the API server is not asked about, however
// much it would like it.
func TestV57_JudgedByTheSameRules(t *testing.T) {
	for name, change := range map[string]func(*tokenissuer.Claims){
		"another audience": func(c *tokenissuer.Claims) { c.Audience = []string{"vault"} },
		"lives too long":   func(c *tokenissuer.Claims) { c.Lifetime = 2 * time.Hour },
		"no pod":           func(c *tokenissuer.Claims) { c.PodName, c.PodUID = "", "" },
		"no node":          func(c *tokenissuer.Claims) { c.NodeName, c.NodeUID = "", "" },
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, yes(nil))
			var invalid *token.InvalidError
			if _, err := s.verify(t, change); !errors.As(err, &invalid) || invalid.Subject != "" {
				t.Errorf("%v; want an InvalidError of nobody", err)
			}
			if n := s.asked.Load(); n != 0 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// What keeps the answer away says nothing about the token.
func TestF22_F23_F32_NoAnswer(t *testing.T) {
	status := func(code int, reason meta.StatusReason) func(http.ResponseWriter, *authentication.TokenReview) {
		return func(w http.ResponseWriter, _ *authentication.TokenReview) {
			if code == http.StatusTooManyRequests {
				w.Header().Set("Retry-After", "30")
			}
			reply(w, code, meta.Status{TypeMeta: meta.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: meta.StatusFailure, Code: int32(code), Reason: reason})
		}
	}
	var s *server
	for name, tt := range map[string]struct {
		answer func(http.ResponseWriter, *authentication.TokenReview)
		reason string
	}{
		"forbidden": {status(http.StatusForbidden, meta.StatusReasonForbidden), `the verb "create" on the resource "tokenreviews" of "authentication.k8s.io"`},
		"broken":    {status(http.StatusInternalServerError, meta.StatusReasonInternalError), "create tokenreviews"},
		"busy":      {status(http.StatusTooManyRequests, meta.StatusReasonTooManyRequests), "create tokenreviews"},
		"silent":    {func(http.ResponseWriter, *authentication.TokenReview) { <-s.release }, "no answer within 3s"},
	} {
		t.Run(name, func(t *testing.T) {
			s = start(t, tt.answer)
			began := time.Now()
			_, err := s.verify(t, nil)
			var unavailable *token.UnavailableError
			if !errors.As(err, &unavailable) || !strings.Contains(err.Error(), tt.reason) {
				t.Errorf("%v; want an UnavailableError with %q", err, tt.reason)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
			if name != "busy" {
				return
			}
			asked := s.asked.Load()
			if _, err := s.verify(t, nil); !errors.As(err, &unavailable) || s.asked.Load() != asked {
				t.Errorf("asked again within the 30 s that the API server wants to be left alone: %v", err)
			}
		})
	}
}

type noKeys struct{}

func (noKeys) Keys(context.Context, string) ([]token.Key, error) { return nil, nil }

// One of the two decides, and the other never steps in.
func TestV57_NoFallback(t *testing.T) {
	r, err := New(Config{API: &rest.Config{Host: "https://127.0.0.1:1"}})
	must(t, err)
	audiences := map[string]time.Duration{"meshca": time.Hour}
	for name, i := range map[string]token.Issuer{
		"both":    {URL: issuerURL, Audiences: audiences, Keys: noKeys{}, Review: r},
		"neither": {URL: issuerURL, Audiences: audiences},
	} {
		if _, err := token.New(token.Config{Issuers: []token.Issuer{i}}); err == nil {
			t.Errorf("%s were taken", name)
		}
	}
}

func pemOf(s *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}
