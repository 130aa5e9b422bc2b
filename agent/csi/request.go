package csi

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/identity"
)

// What the kubelet puts into a request, by the names that Kubernetes gave it.
const (
	keyPrefix         = "csi.storage.k8s.io/"
	keyPod            = keyPrefix + "pod.name"
	keyNamespace      = keyPrefix + "pod.namespace"
	keyUID            = keyPrefix + "pod.uid"
	keyServiceAccount = keyPrefix + "serviceAccount.name"
	keyEphemeral      = keyPrefix + "ephemeral"
	keyTokens         = keyPrefix + "serviceAccount.tokens"
)

const (
	maxVolumeID = 128 // bytes, as the CSI specification has it
	maxToken    = 8 << 10
)

// claim is what the kubelet says of a volume, checked: which pod has it, where it
// is, and who the pod is. It holds no secret.
type claim struct {
	id             string
	target         target
	namespace, pod string
	serviceAccount string
	spiffeID       identity.ID
}

// who names the pod for people.
func (c *claim) who() string { return c.namespace + "/" + c.pod }

// newClaim checks what both a request and an entry of the state say.
func newClaim(td identity.TrustDomain, pods pods, id, path, namespace, pod, uid, serviceAccount string) (*claim, error) {
	if !isVolumeID(id) {
		return nil, fmt.Errorf("the volume's ID %.128q is empty, too long or not printable", id)
	}
	t, err := pods.parse(path)
	if err != nil {
		return nil, err
	}
	if t.pod != uid {
		return nil, fmt.Errorf("the target path is of pod %q, the volume of pod %.64q", t.pod, uid)
	}
	// A pod's name is a label or a subdomain; it goes into logs alone.
	if pod == "" || len(pod) > 253 || strings.ContainsFunc(pod, func(r rune) bool { return r != '.' && !isName(string(r), 1) }) {
		return nil, fmt.Errorf("%.64q is no pod's name", pod)
	}
	spiffeID, err := identity.WorkloadID(td, namespace, serviceAccount)
	if err != nil {
		return nil, err
	}
	return &claim{id: id, target: t, namespace: namespace, pod: pod, serviceAccount: serviceAccount, spiffeID: spiffeID}, nil
}

func isVolumeID(s string) bool {
	return s != "" && len(s) <= maxVolumeID && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// readClaim reads a request to publish. Its errors are for the event that the
// kubelet makes of them: they say what to write where.
func (p *Plugin) readClaim(req *csi.NodePublishVolumeRequest) (*claim, error) {
	about := req.GetVolumeContext()
	if req.GetVolumeCapability().GetMount() == nil {
		return nil, status.Error(codes.InvalidArgument, "the volume is a folder; it cannot be had as a block device or without a capability")
	}
	for _, key := range []string{keyPod, keyNamespace, keyUID, keyServiceAccount} {
		if about[key] == "" {
			return nil, status.Errorf(codes.FailedPrecondition, "the kubelet does not say whose volume this is (%s is missing); set \"podInfoOnMount: true\" in the CSIDriver %s", key, DriverName)
		}
	}
	if about[keyEphemeral] != "true" {
		return nil, status.Errorf(codes.InvalidArgument, "the volume is not written in the pod itself; %s serves inline volumes only: \"csi: {driver: %s, readOnly: true}\"", DriverName, DriverName)
	}
	for _, key := range slices.Sorted(maps.Keys(about)) {
		if !strings.HasPrefix(key, keyPrefix) {
			return nil, status.Errorf(codes.InvalidArgument, "the volume has the attribute %.64q; %s knows none: remove \"volumeAttributes\"", key, DriverName)
		}
	}
	if !req.GetReadonly() {
		return nil, status.Errorf(codes.InvalidArgument,
			"the volume must be read-only, or a program of the pod could put a socket of its own in the place of the agent's: write \"readOnly: true\" beside \"driver: %s\" in the pod's volume", DriverName)
	}
	c, err := newClaim(p.td, p.pods, req.GetVolumeId(), req.GetTargetPath(), about[keyNamespace], about[keyPod], about[keyUID], about[keyServiceAccount])
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return c, nil
}

// readToken returns the pod's token from a request. Its errors, which end up in
// events, hold no part of it.
func readToken(c *claim, req *csi.NodePublishVolumeRequest) (string, error) {
	if req.GetVolumeContext()[keyTokens] != "" {
		// Volume contexts are logged by kubelets and by whatever speaks CSI.
		return "", status.Errorf(codes.FailedPrecondition,
			"the pod's token came in the volume context, from where it gets into logs, and is not used; set \"serviceAccountTokenInSecrets: true\" in the CSIDriver %s", DriverName)
	}
	var tokens map[string]struct {
		Token string `json:"token"`
	}
	text := req.GetSecrets()[keyTokens]
	if text != "" && json.Unmarshal([]byte(text), &tokens) != nil {
		return "", status.Error(codes.InvalidArgument, "the tokens that the kubelet sent cannot be read")
	}
	token := tokens[audience].Token
	if token == "" {
		return "", status.Errorf(codes.FailedPrecondition,
			"the kubelet sent no token for the audience %q; the CSIDriver %s needs \"tokenRequests: [{audience: %s}]\" and \"serviceAccountTokenInSecrets: true\"", audience, DriverName, audience)
	}
	if len(token) > maxToken || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", status.Error(codes.InvalidArgument, "the token that the kubelet sent is none")
	}
	if err := matchToken(c, token); err != nil {
		return "", status.Error(codes.InvalidArgument, err.Error())
	}
	return token, nil
}

// matchToken compares what a token says of itself with what the kubelet says of
// the volume. The CA verifies it; here it is only that one pod's token must
// never come to serve another's volume.
func matchToken(c *claim, token string) error {
	says, err := caclient.ReadClaims(token)
	if err != nil {
		return fmt.Errorf("the token that the kubelet sent for pod %s: %w", c.who(), err)
	}
	for _, m := range []struct{ what, token, volume string }{
		{"pod UID", says.PodUID, c.target.pod},
		{"pod", says.PodName, c.pod},
		{"namespace", says.Namespace, c.namespace},
		{"ServiceAccount", says.ServiceAccount, c.serviceAccount},
	} {
		if m.token != m.volume {
			return fmt.Errorf("the token that the kubelet sent is for %s %.64q, and the volume is of %.64q: the volume of one pod never serves another", m.what, m.token, m.volume)
		}
	}
	return nil
}
