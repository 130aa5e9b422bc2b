package audit_test

import (
	"bytes"
	"encoding/json"
	"os"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/caller"
	"github.com/meshca/meshca/ca/catest"
	"github.com/meshca/meshca/identity"
)

// What stands in the trail about a caller is enough to find the pod, and never
// the token.
func TestRecordNamesTheCaller(t *testing.T) {
	k := catest.New(t)
	raw, key := k.Token(t, "shop", "cart"), catest.NewKey(t)
	who, err := k.Authenticator.Authenticate(t.Context(), caller.Credentials{Bearer: raw, Peer: "10.0.0.7:4711"})
	if err != nil {
		t.Fatal(err)
	}
	issued, err := k.Authority.Issue(t.Context(), who, key.Public(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	trail, err := os.ReadFile(k.AuditFile)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Split(bytes.TrimSpace(trail), []byte("\n"))
	var got struct {
		Stage, Serial string
		ID            string `json:"spiffe_id"`
		Caller        map[string]string
	}
	if err := json.Unmarshal(lines[len(lines)-1], &got); err != nil {
		t.Fatal(err)
	}
	pod, uid := who.Pod()
	want := map[string]string{"by": "token", "pod": pod, "pod_uid": uid, "node": "node-1",
		"issuer": catest.Issuer, "audience": catest.Audience, "peer": "10.0.0.7:4711"}
	for k, v := range want {
		if got.Caller[k] != v {
			t.Errorf("caller's %s is %q, want %q", k, got.Caller[k], v)
		}
	}
	if got.Caller["token_id"] == "" || got.Stage != "done" || got.ID != who.ID().String() || got.Serial != identity.SerialString(issued.Chain[0]) {
		t.Errorf("last line %s", lines[len(lines)-1])
	}
	for _, part := range bytes.Split([]byte(raw), []byte(".")) {
		if bytes.Contains(trail, part) {
			t.Error("a part of the token stands in the trail")
		}
	}
}
