package csi_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/agent/csi"
)

// Every request that a kubelet would not send is refused with what to do, and
// leaves nothing.
func TestV36_V39_T17_RequestsThatDoNotFitAreRefused(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p, other := w.pod(1), w.pod(2)
	w.target(other)
	admin := p
	admin.account = "admin"
	elsewhere := p
	elsewhere.namespace = "bank"
	renamed := p
	renamed.name = "cart-9"
	token := p.token(w, "meshca")
	pods := filepath.Join(w.node.Kubelet, "pods")
	type request = spec.NodePublishVolumeRequest
	for name, tt := range map[string]struct {
		change func(*request)
		code   codes.Code
		says   string
	}{
		"no volume ID":          {func(r *request) { r.VolumeId = "" }, codes.InvalidArgument, "volume's ID"},
		"a huge volume ID":      {func(r *request) { r.VolumeId = strings.Repeat("a", 129) }, codes.InvalidArgument, "volume's ID"},
		"no capability":         {func(r *request) { r.VolumeCapability = nil }, codes.InvalidArgument, "capability"},
		"writable":              {func(r *request) { r.Readonly = false }, codes.InvalidArgument, `write "readOnly: true"`},
		"no pod's name":         {func(r *request) { delete(r.VolumeContext, "csi.storage.k8s.io/pod.name") }, codes.FailedPrecondition, "podInfoOnMount: true"},
		"a persistent volume":   {func(r *request) { delete(r.VolumeContext, "csi.storage.k8s.io/ephemeral") }, codes.InvalidArgument, "inline volumes"},
		"an attribute":          {func(r *request) { r.VolumeContext["identity"] = "admin" }, codes.InvalidArgument, `remove "volumeAttributes"`},
		"token in the context":  {func(r *request) { r.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"] = "{}" }, codes.FailedPrecondition, "serviceAccountTokenInSecrets: true"},
		"no token":              {func(r *request) { r.Secrets = nil }, codes.FailedPrecondition, "tokenRequests: [{audience: meshca}]"},
		"tokens not JSON":       {func(r *request) { r.Secrets["csi.storage.k8s.io/serviceAccount.tokens"] = "{" + token }, codes.InvalidArgument, "cannot be read"},
		"no JWT":                {func(r *request) { r.Secrets = w.request(p, "secret-canary").GetSecrets() }, codes.InvalidArgument, "not a JWT"},
		"token with a newline":  {func(r *request) { r.Secrets = w.request(p, token+"\nx").GetSecrets() }, codes.InvalidArgument, "is none"},
		"another pod's token":   {func(r *request) { r.Secrets = w.request(p, other.token(w, "meshca")).GetSecrets() }, codes.InvalidArgument, "for pod UID"},
		"another account's":     {func(r *request) { r.Secrets = w.request(p, admin.token(w, "meshca")).GetSecrets() }, codes.InvalidArgument, "for ServiceAccount"},
		"another namespace's":   {func(r *request) { r.Secrets = w.request(p, elsewhere.token(w, "meshca")).GetSecrets() }, codes.InvalidArgument, "for namespace"},
		"another name's":        {func(r *request) { r.Secrets = w.request(p, renamed.token(w, "meshca")).GetSecrets() }, codes.InvalidArgument, "for pod"},
		"a bad namespace":       {func(r *request) { r.VolumeContext["csi.storage.k8s.io/pod.namespace"] = "../x" }, codes.InvalidArgument, ""},
		"a bad account":         {func(r *request) { r.VolumeContext["csi.storage.k8s.io/serviceAccount.name"] = "a/b" }, codes.InvalidArgument, ""},
		"a bad pod's name":      {func(r *request) { r.VolumeContext["csi.storage.k8s.io/pod.name"] = "a\nb" }, codes.InvalidArgument, "no pod's name"},
		"another pod's folder":  {func(r *request) { r.TargetPath = w.target(other) }, codes.InvalidArgument, "the target path is of pod"},
		"no path":               {func(r *request) { r.TargetPath = "" }, codes.InvalidArgument, "target path"},
		"a path elsewhere":      {func(r *request) { r.TargetPath = "/etc/kubernetes" }, codes.InvalidArgument, "--kubelet-dir"},
		"a way out":             {func(r *request) { r.TargetPath = filepath.Dir(w.target(p)) + "/../../../../../etc" }, codes.InvalidArgument, "target path"},
		"a detour":              {func(r *request) { r.TargetPath = pods + "/./" + strings.TrimPrefix(w.target(p), pods) }, codes.InvalidArgument, "target path"},
		"dots for a volume":     {func(r *request) { r.TargetPath = pods + "/" + p.uid + "/volumes/kubernetes.io~csi/../mount" }, codes.InvalidArgument, "target path"},
		"another plugin's":      {func(r *request) { r.TargetPath = strings.Replace(w.target(p), "~csi", "~empty-dir", 1) }, codes.InvalidArgument, "target path"},
		"the pod's own folder":  {func(r *request) { r.TargetPath = pods + "/" + p.uid }, codes.InvalidArgument, "target path"},
		"a longer path":         {func(r *request) { r.TargetPath = w.target(p) + "/mount" }, codes.InvalidArgument, "target path"},
		"a volume that is not":  {func(r *request) { r.TargetPath = strings.Replace(w.target(p), "/meshca/", "/other/", 1) }, codes.FailedPrecondition, "making the folder"},
		"more than the kubelet": {func(r *request) { r.PublishContext = map[string]string{"x": strings.Repeat("a", 64<<10)} }, codes.ResourceExhausted, ""},
	} {
		t.Run(name, func(t *testing.T) {
			req := w.request(p, token)
			tt.change(req)
			_, err := i.NodePublishVolume(w.context(), req)
			if status.Code(err) != tt.code || !strings.Contains(status.Convert(err).Message(), tt.says) {
				t.Errorf("got %v; want %v with %q", err, tt.code, tt.says)
			}
			if exists(w.target(p)) || exists(w.target(other)) || len(w.stateFiles()) != 0 {
				t.Error("it left something behind")
			}
		})
	}
	w.publish(i, p)
	moved := w.request(p, token)
	moved.TargetPath = w.target(other)
	if _, err := i.NodePublishVolume(w.context(), moved); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a volume at two places: %v", err)
	}
	for _, path := range []string{"", "/etc", filepath.Join(w.node.Kubelet, "pods"), filepath.Dir(w.target(p)), w.target(other)} {
		if _, err := i.NodeUnpublishVolume(w.context(), &spec.NodeUnpublishVolumeRequest{VolumeId: p.volume(), TargetPath: path}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("unpublishing from %q: %v", path, err)
		}
	}
	w.served(p)
}

// A symbolic link anywhere below the kubelet's folder leads nowhere, though what
// it points to is below it too.
func TestV67_NoSymbolicLinkIsFollowed(t *testing.T) {
	for _, link := range []string{"", "volumes", "volumes/kubernetes.io~csi", "volumes/kubernetes.io~csi/meshca", "volumes/kubernetes.io~csi/meshca/mount"} {
		t.Run("pods/uid/"+link, func(t *testing.T) {
			w := newWorld(t)
			i := w.start()
			p := w.pod(1)
			target := w.target(p)
			check(t, os.Mkdir(target, 0o755))
			from := filepath.Join(w.node.Kubelet, "pods", p.uid, link)
			to := filepath.Join(w.node.Kubelet, "pods", "elsewhere")
			check(t, os.Rename(from, to))
			check(t, os.Symlink("elsewhere", filepath.Join(w.node.Kubelet, "pods", "link")))
			up := strings.Repeat("../", strings.Count(strings.TrimPrefix(from, filepath.Join(w.node.Kubelet, "pods")+"/"), "/"))
			check(t, os.Symlink(up+"elsewhere", from))
			if _, err := os.Stat(target); err != nil {
				t.Fatalf("the link shows nothing: %v", err)
			}
			req := w.request(p, p.token(w, "meshca"))
			_, err := i.NodePublishVolume(w.context(), req)
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "no folder") {
				t.Errorf("published: %v", err)
			}
			_, err = i.NodeUnpublishVolume(w.context(), &spec.NodeUnpublishVolumeRequest{VolumeId: p.volume(), TargetPath: target})
			if err == nil || !exists(from) {
				t.Errorf("unpublished through a link: %v", err)
			}
			if exists(filepath.Join(target, "agent.sock")) {
				t.Error("there is a socket")
			}
		})
	}
}

// Tokens are in no log, no error and no metric, whatever goes wrong with them.
func TestV56_TokensAreNowhere(t *testing.T) {
	w := newWorld(t)
	i := w.start()
	p := w.pod(1)
	var tokens, texts []string
	try := func(token string, change func(*spec.NodePublishVolumeRequest)) {
		tokens = append(tokens, token)
		req := w.request(p, token)
		if change != nil {
			change(req)
		}
		if _, err := i.NodePublishVolume(w.context(), req); err != nil {
			texts = append(texts, err.Error())
		}
	}
	const key = "csi.storage.k8s.io/serviceAccount.tokens"
	refused := func() {
		try(p.token(w, "vault"), nil)
		try(w.pod(2).token(w, "meshca"), nil)
		try("canary.c2VjcmV0LWNhbmFyeQ.c2VjcmV0LWNhbmFyeQ", nil)
		try("secret-canary-"+strings.Repeat("x", 9000), nil)
		try(p.token(w, "meshca"), func(r *spec.NodePublishVolumeRequest) { r.VolumeContext[key] = r.GetSecrets()[key] })
		try(p.token(w, "meshca"), func(r *spec.NodePublishVolumeRequest) { r.Secrets[key] = r.GetSecrets()[key][1:] })
		try(p.token(w, "meshca"), func(r *spec.NodePublishVolumeRequest) { r.Readonly = false })
	}
	refused()
	if len(texts) != 7 {
		t.Errorf("%d of 7 were refused", len(texts))
	}
	try(p.token(w, "meshca"), nil)
	refused() // now as republishes
	w.served(p)
	i.stop()
	i = w.start()
	w.served(p)
	w.unpublish(i, p)
	families, err := i.metrics.Gather()
	check(t, err)
	for _, f := range families {
		texts = append(texts, f.String())
	}
	i.stop()
	texts = append(texts, w.log.String())
	for _, token := range tokens {
		for part := range strings.SplitSeq(token, ".") {
			if len(part) < 8 || part == strings.Split(tokens[0], ".")[0] { // the header is alike in all, and no secret
				continue
			}
			for _, text := range texts {
				if at := strings.Index(text, part[:min(len(part), 60)]); at >= 0 {
					t.Fatalf("there is a part of a token: %q", text[max(0, at-200):at+20])
				}
			}
		}
	}
}

// The kubelet's socket is for root alone.
func TestT9_SocketsForTheKubelet(t *testing.T) {
	w := newWorld(t)
	w.start()
	for _, path := range []string{"plugins/" + csi.DriverName + "/csi.sock", "plugins_registry/" + csi.DriverName + "-reg.sock"} {
		info, err := os.Lstat(filepath.Join(w.node.Kubelet, path))
		check(t, err)
		if info.Mode() != os.ModeSocket|0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
	}
}
