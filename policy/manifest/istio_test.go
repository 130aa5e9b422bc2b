package manifest

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	security "istio.io/api/security/v1beta1"
	istiotype "istio.io/api/type/v1beta1"

	"github.com/meshca/meshca/policy"
)

func TestFromAPI(t *testing.T) {
	mtls := func(n int32) *security.PeerAuthentication_MutualTLS {
		return &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_Mode(n)}
	}
	created := time.Unix(3, 0)
	ref := policy.Ref{Namespace: "foo", Name: "w"}
	got := FromAPI(ref, created, &security.PeerAuthentication{
		Selector:      &istiotype.WorkloadSelector{MatchLabels: map[string]string{"app": "a"}},
		Mtls:          mtls(7),
		PortLevelMtls: map[uint32]*security.PeerAuthentication_MutualTLS{0: mtls(1), 1: mtls(1), 2: mtls(2), 3: mtls(3), 4: nil, 5: mtls(0), 6: mtls(-1), 65536 + 7: mtls(1)},
	})
	want := policy.Policy{
		Ref: ref, Created: created, Selector: map[string]string{"app": "a"}, Mode: policy.Unknown,
		Ports: map[uint16]policy.Mode{1: policy.Disable, 2: policy.Permissive, 3: policy.Strict, 4: policy.Unset, 5: policy.Unset, 6: policy.Unknown},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got, want := FromAPI(ref, time.Time{}, nil), (policy.Policy{Ref: ref, Mode: policy.Unset}); !cmp.Equal(want, got) {
		t.Error(cmp.Diff(want, got))
	}
}
