package canary

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/metadata"

	"github.com/meshca/meshca/identity/token/tokenissuer"
)

// Every path, golden or not, is gone down with secrets that are looked for
// afterwards in all that came out.
func TestV11_NothingWrittenHoldsASecret(t *testing.T) {
	w := newWorld(t)
	w.keysFromSocket(t, 1)
	w.abuseCA(t)
	w.abuseSocket(t)
	w.startBadAgents(t)
	w.startBadCAs(t)
	w.keysFromSocket(t, 1) // after a renewal

	outputs := w.pages(t)
	// A crash dump is output, too.
	for _, p := range []*process{w.ca, w.agent} {
		must(t, p.Signal(syscall.SIGQUIT))
		p.ended(t)
		if !strings.Contains(string(p.Log()), "SIGQUIT: quit") {
			t.Errorf("%s left no dump", p.name)
		}
	}
	for _, p := range w.processes {
		outputs[p.name+"'s output"] = p.Log()
	}
	audit, err := os.ReadFile(w.auditLog)
	must(t, err)
	outputs["the audit log"] = audit
	bytes := 0
	for name, text := range outputs {
		bytes += len(text)
		if len(text) == 0 {
			t.Errorf("%s is empty; there is nothing to look at", name)
		}
		for _, found := range append(w.findings(text), privateKeys(text)...) {
			t.Errorf("%s holds %s", name, found)
		}
	}
	if w.keys < 2 {
		t.Errorf("%d keys were looked for; the certificate has been renewed", w.keys)
	}
	t.Logf("%d secrets looked for in %d outputs, %d bytes", len(w.secrets), len(outputs), bytes)
}

// pages are what the operations ports show.
func (w *world) pages(t *testing.T) map[string][]byte {
	t.Helper()
	all := make(map[string][]byte)
	for program, address := range map[string]string{"the CA": w.caOps, "the agent": w.agentOps} {
		for _, path := range []string{
			"/metrics", "/readyz", "/livez", "/debug/pprof/cmdline", "/debug/pprof/goroutine?debug=2",
			"/debug/pprof/heap?debug=1", "/debug/pprof/allocs?debug=1",
		} {
			_, body, err := get(address, path)
			must(t, err)
			all[program+"'s "+path] = []byte(body)
		}
	}
	return all
}

// abuseCA makes calls to the CA that are refused for what they show.
func (w *world) abuseCA(t *testing.T) {
	t.Helper()
	conn, csr := w.dialCA(t), newCSR(t, nil)
	good := w.good(t)
	for name, authorization := range w.badTokens(t) {
		if _, err := create(t, conn, csr, "Bearer "+authorization); err == nil {
			t.Errorf("%s was taken", name)
		} else if found := w.findings([]byte(err.Error())); len(found) > 0 {
			t.Errorf("%s: the answer %q holds %q", name, err, found)
		}
	}
	for name, authorization := range map[string][]string{
		"two values": {"Bearer " + good, "Bearer " + good}, "no Bearer": {good}, "lower case": {"bearer " + good},
		"Basic": {"Basic " + good}, "a space more": {"Bearer  " + good}, "a comma": {"Bearer " + good + ", Bearer " + good},
	} {
		if _, err := create(t, conn, csr, authorization...); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	// What is not a CSR may be a secret that was put into the wrong field.
	for name, bad := range map[string]string{
		"a key": w.newKeyPEM(t, "a key sent as a CSR"), "a token": good, "a key after the CSR": csr + w.newKeyPEM(t, "a key behind a CSR"),
		"a key named CSR":  strings.ReplaceAll(w.newKeyPEM(t, "a key named CSR"), "PRIVATE KEY", "CERTIFICATE REQUEST"),
		"headers in a CSR": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Headers: map[string]string{"Token": good}, Bytes: []byte("x")})),
	} {
		if _, err := create(t, conn, bad, "Bearer "+good); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	w.nackCA(t, good)
}

// nackCA rejects a resource of the CA's delta xDS.
func (w *world) nackCA(t *testing.T, good string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+good), patience)
	defer cancel()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(w.dialCA(t)).DeltaAggregatedResources(ctx)
	must(t, err)
	const typeURL = "type.googleapis.com/meshca.v1.Workload"
	must(t, stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL}))
	answer, err := stream.Recv()
	must(t, err)
	must(t, stream.Send(&discovery.DeltaDiscoveryRequest{
		TypeUrl: typeURL, ResponseNonce: answer.GetNonce(), ErrorDetail: &rpcstatus.Status{Code: 3, Message: "canary: no, thanks"},
	}))
	w.ca.line(t, "the NACK", func(l map[string]any) bool { return strings.Contains(fmt.Sprint(l), "canary: no, thanks") })
}

// badTokens are tokens that prove nothing.
func (w *world) badTokens(t *testing.T) map[string]string {
	t.Helper()
	other, err := tokenissuer.New(tokenissuer.Config{URL: issuerURL})
	must(t, err)
	unknown, err := other.Issue(claims())
	must(t, err)
	past, err := tokenissuer.New(tokenissuer.Config{URL: "https://nobody.test", Now: func() time.Time { return time.Now().Add(-2 * time.Hour) }})
	must(t, err)
	expired, err := past.Issue(claims())
	must(t, err)
	good := w.good(t)
	cut := strings.LastIndex(good, ".")
	return map[string]string{
		"another audience":   w.issue(t, "a token of another audience", func(c *tokenissuer.Claims) { c.Audience = []string{"vault"} }),
		"too long a life":    w.issue(t, "a long-lived token", func(c *tokenissuer.Claims) { c.Lifetime = 48 * time.Hour }),
		"no pod":             w.issue(t, "a token without a pod", func(c *tokenissuer.Claims) { c.PodName, c.PodUID = "", "" }),
		"another key":        w.token("a token by another key", unknown),
		"another issuer":     w.token("an expired token of another issuer", expired),
		"no signature":       good[:cut] + ".",
		"another signature":  good[:cut] + "." + strings.Repeat("A", len(good)-cut-1),
		"four parts":         good + ".more",
		"a quote in it":      good[:cut] + `"` + good[cut:],
		"garbage":            w.token("garbage", "garbage-4f1d7a52c0b94e66a1f4"),
		"garbage with dots":  w.token("garbage with dots", "garbage-a.garbage-b5f0c-9d3e-77aa-10.garbage-c27be-41c2-90fe-aa"),
		"too large":          good + strings.Repeat("x", 9<<10),
		"a key":              strings.ReplaceAll(w.newKeyPEM(t, "a key sent as a token"), "\n", ""),
		"unknown and quoted": fmt.Sprintf("%q", good),
	}
}

// abuseSocket makes calls to the agent's socket that are refused, and rejects
// what it delivers.
func (w *world) abuseSocket(t *testing.T) {
	t.Helper()
	conn := w.dialSocket(t)
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+w.good(t)), patience)
	defer cancel()
	for name, header := range map[string][]string{"no header": nil, "another value": {"True"}, "two values": {"true", "true"}} {
		c := ctx
		for _, h := range header {
			c = metadata.AppendToOutgoingContext(c, "workload.spiffe.io", h)
		}
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(c, &workload.X509SVIDRequest{})
		must(t, err)
		if _, err := stream.Recv(); err == nil {
			t.Errorf("%s: an SVID was given", name)
		}
	}
	// Some client might put what it could not use into its complaint.
	for name, detail := range map[string]string{
		"plain": "canary: no, thanks",
		"key":   "canary: cannot parse " + w.keyFromSDS(t, ctx),
	} {
		stream, err := secretservice.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
		must(t, err)
		const typeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
		ask := &discovery.DiscoveryRequest{TypeUrl: typeURL, ResourceNames: []string{"default", "ROOTCA"}, Node: &core.Node{Id: "canary-" + name}}
		must(t, stream.Send(ask))
		answer, err := stream.Recv()
		must(t, err)
		ask.ResponseNonce, ask.ErrorDetail = answer.GetNonce(), &rpcstatus.Status{Code: 13, Message: detail}
		must(t, stream.Send(ask))
		w.agent.line(t, "the NACK", func(l map[string]any) bool {
			return strings.Contains(fmt.Sprint(l["node"]), "canary-"+name) && strings.Contains(fmt.Sprint(l), "canary: ")
		})
		must(t, stream.CloseSend())
	}
}

// keyFromSDS fetches the secret that Envoy gets, remembers its key and returns
// it as PEM.
func (w *world) keyFromSDS(t *testing.T, ctx context.Context) string {
	t.Helper()
	answer, err := secretservice.NewSecretDiscoveryServiceClient(w.dialSocket(t)).FetchSecrets(ctx, &discovery.DiscoveryRequest{
		TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", ResourceNames: []string{"default"},
	})
	must(t, err)
	secret := string(answer.GetResources()[0].GetValue())
	begin := strings.Index(secret, "-----BEGIN PRIVATE KEY-----")
	if begin < 0 {
		t.Fatal("the secret holds no key")
	}
	block, _ := pem.Decode([]byte(secret[begin:]))
	w.key(t, "the key that SDS gives", block.Bytes)
	return string(pem.EncodeToMemory(block))
}

// startBadAgents starts agents that cannot get what they want, and waits until
// each has said so.
func (w *world) startBadAgents(t *testing.T) {
	t.Helper()
	good := w.good(t)
	key := w.newKeyPEM(t, "a key in a file that is not for it")
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	down := closed.Addr().String()
	must(t, closed.Close())
	other := filepath.Join(w.dir, "other.pem")
	must(t, os.WriteFile(other, otherRoot(t), 0o600))

	type agent struct{ token, anchor, ca string }
	agents := map[string]agent{
		"no-ca":       {w.tokenFile(t, "no-ca", good), w.anchor, down},
		"other-root":  {w.tokenFile(t, "other-root", good), other, w.caPort},
		"key-anchor":  {w.tokenFile(t, "key-anchor", good), w.write(t, "anchor-key.pem", key), w.caPort},
		"token-anch":  {w.tokenFile(t, "token-anch", good), w.write(t, "anchor-token", good), w.caPort},
		"no-token":    {filepath.Join(w.tokens, "absent"), w.anchor, w.caPort},
		"folder":      {w.tokens, w.anchor, w.caPort},
		"key-token":   {w.tokenFile(t, "key-token", key), w.anchor, w.caPort},
		"two-tokens":  {w.tokenFile(t, "two-tokens", good+"\n"+good), w.anchor, w.caPort},
		"empty-token": {w.tokenFile(t, "empty-token", "\n"), w.anchor, w.caPort},
	}
	n := 0
	for _, bad := range w.badTokens(t) {
		n++
		name := fmt.Sprintf("bad-token-%d", n)
		agents[name] = agent{w.tokenFile(t, name, bad), w.anchor, w.caPort}
	}
	unreadable := w.tokenFile(t, "unreadable", good)
	must(t, os.Chmod(unreadable, 0)) // to root it is a good one
	if os.Getuid() != 0 {
		agents["unreadable"] = agent{unreadable, w.anchor, w.caPort}
	}
	var running []*process
	for name, a := range agents {
		running = append(running, w.launchAgent(t, name, a.token, a.anchor, a.ca))
	}
	for _, p := range running {
		ops := p.serving(t)["ops"].(string)
		p.line(t, "that it has no certificate", func(l map[string]any) bool {
			return l["level"] == "ERROR" && strings.Contains(fmt.Sprint(l["msg"]), "next try in")
		})
		status, body, err := get(ops, "/readyz")
		must(t, err)
		_, metrics, err := get(ops, "/metrics")
		must(t, err)
		if status == 200 {
			t.Errorf("%s is ready", p.name)
		}
		if found := w.findings([]byte(body + metrics)); len(found) > 0 {
			t.Errorf("%s shows %q on its operations port", p.name, found)
		}
		must(t, p.Stop(patience))
	}
	// Secrets where settings belong.
	w.launchAgent(t, "token-config", w.tokenFile(t, "for-config", good), w.anchor, w.caPort, "--config", w.tokenFile(t, "config", good)).ended(t)
	w.launchAgent(t, "key-config", w.tokenFile(t, "for-config", good), w.anchor, w.caPort, "--config", w.write(t, "config-key", key)).ended(t)
	w.launchAgent(t, "token-as-path", good, w.anchor, w.caPort).ended(t)
}

// startBadCAs starts CAs that find secrets where they do not belong, or not as
// they should be.
func (w *world) startBadCAs(t *testing.T) {
	t.Helper()
	must(t, os.CopyFS(filepath.Join(w.dir, "damaged"), os.DirFS(w.state)))
	rootKey := filepath.Join(w.dir, "damaged", "authority", "root.key")
	content, err := os.ReadFile(rootKey)
	must(t, err)
	block, _ := pem.Decode(content)
	w.key(t, "the root's key", block.Bytes)
	content[len(content)/2] ^= 1
	must(t, os.WriteFile(rootKey, content, 0o600))
	private := w.write(t, "private-jwks.json", `{"keys":[{"kty":"EC","crv":"P-256","kid":"x","d":"`+
		w.token("a private JWK", "ZGQtcHJpdmF0ZS1zY2FsYXItY2FuYXJ5")+`","x":"AAAA","y":"BBBB"}]}`)
	for name, args := range map[string][]string{
		"damaged-state":  {"--state-dir", filepath.Join(w.dir, "damaged"), "--config", filepath.Join(w.dir, "meshca.yaml"), "--test-lifetimes"},
		"key-as-config":  {"--state-dir", w.state, "--config", filepath.Join(w.state, "authority", "root.key")},
		"jwks-as-config": {"--state-dir", w.state, "--config", private},
	} {
		w.launch(t, name, "meshca", append([]string{"serve", "--log-level", "debug", "--listen", "127.0.0.1:0", "--ops-listen", ""}, args...)...).ended(t)
	}
	config := w.write(t, "private.yaml", "token_issuers:\n- issuer: "+issuerURL+"\n  jwks_file: "+private+"\n")
	p := w.launch(t, "private-jwks", "meshca", "serve", "--log-level", "debug", "--state-dir", w.state, "--config", config, "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0")
	serving := p.serving(t)
	// It serves and can sign, and says that it knows nobody.
	eventually(t, p.name+" to miss its keys", func() error {
		_, body, err := get(serving["ops"].(string), "/readyz")
		if err == nil && !strings.Contains(body, "its keys have not been read") {
			err = errors.New(strings.TrimSpace(body))
		}
		return err
	})
	caPort := w.caPort
	w.caPort = serving["listen"].(string)
	if _, err := create(t, w.dialCA(t), newCSR(t, nil), "Bearer "+w.good(t)); err == nil {
		t.Error("a token was taken with a key set that holds no key for it")
	}
	w.caPort = caPort
	must(t, errors.Join(p.Stop(patience)))
}
