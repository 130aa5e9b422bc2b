package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/identity"
)

// A pod under Pod Security baseline, and what it might try to get another's identity.

func TestT9_NoPathOutOfTheVolume(t *testing.T) {
	ns := namespace(t)
	account(t, ns, "victim")
	account(t, ns, "thief")
	spec := app(ns, "thief", "thief", true)
	spec.Spec.Volumes = append(spec.Spec.Volumes, corev1.Volume{Name: "own", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
	spec.Spec.Containers[0].VolumeMounts = append(spec.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: "own", MountPath: "/own"})
	pods := start(t, app(ns, "victim", "victim", true), spec)
	victim, thief := pods[0], pods[1]
	victim.svid(t)
	thief.svid(t)
	uid := podUID(t, victim)
	for _, tt := range []struct{ name, op, from, to string }{
		// The other's folder, by the path that the node has it under.
		{"guessed path", "read", filepath.Join(node.KubeletDir(), "pods", uid, "volumes/kubernetes.io~csi/meshca/mount/agent.sock"), ""},
		{"guessed path from the volume", "read", "/run/meshca/../../../" + uid, ""},
		// In the folder that the agent reads.
		{"symlink in the volume", "symlink", "/own", "/run/meshca/link"},
		{"file in the volume", "write", "", "/run/meshca/file"},
		{"another socket in its place", "remove", "", "/run/meshca/agent.sock"},
		{"moving the socket", "rename", "/run/meshca/agent.sock", "/own/agent.sock"},
		// The socket under another name, to be handed on.
		{"hard link", "link", "/run/meshca/agent.sock", "/own/agent.sock"},
		{"copy", "read", "/run/meshca/agent.sock", ""},
	} {
		var out any
		if err := thief.do(t.Context(), "/file", map[string]string{"op": tt.op, "from": tt.from, "to": tt.to}, &out); err == nil {
			t.Errorf("%s: it worked: %v", tt.name, out)
		}
	}
	// A link that leads nowhere for the thief, whatever it leads to on the node.
	link := map[string]string{"op": "symlink", "from": filepath.Join(node.KubeletDir(), "pods", uid, "volumes/kubernetes.io~csi/meshca/mount/agent.sock"), "to": "/own/other.sock"}
	if err := thief.do(t.Context(), "/file", link, nil); err != nil {
		t.Fatal(err)
	}
	for _, socket := range []string{"/own/other.sock", link["from"]} {
		var s svid
		if err := thief.do(t.Context(), "/svid", map[string]string{"socket": socket, "ms": "2000"}, &s); err == nil {
			t.Errorf("by %s the thief is %s", socket, s.ID)
		}
	}
	// All that there is to see from inside is the pod's own.
	var seen []string
	if err := thief.do(t.Context(), "/file", map[string]string{"op": "list", "from": "/run/meshca"}, &seen); err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(seen, " "), "/run/meshca /run/meshca/agent.sock"; got != want {
		t.Errorf("in the volume are %q, want %q", got, want)
	}
}

func TestT9_WhatBaselineAdmits(t *testing.T) {
	ns := namespace(t)
	hostPath := app(ns, "host-path", "default", false)
	hostPath.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: node.KubeletDir()}}}}
	if _, err := client.CoreV1().Pods(ns).Create(t.Context(), hostPath, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a pod with the kubelet's folder: %v, want it forbidden: the boundary rests on that", err)
	}
	// Whoever writes a pod cannot name another's in the volume.
	account(t, ns, "victim")
	victim := start(t, app(ns, "victim", "victim", true))[0]
	liar := app(ns, "liar", "default", true)
	liar.Spec.Volumes[0].CSI.VolumeAttributes = map[string]string{
		"csi.storage.k8s.io/pod.name": victim.name, "csi.storage.k8s.io/pod.uid": podUID(t, victim),
		"csi.storage.k8s.io/serviceAccount.name": "victim", "csi.storage.k8s.io/pod.namespace": ns,
	}
	if _, err := client.CoreV1().Pods(ns).Create(t.Context(), liar, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the liar to be itself, or not to start", func(ctx context.Context) error {
		now, err := client.CoreV1().Pods(ns).Get(ctx, "liar", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if now.Status.Phase != corev1.PodRunning {
			return failedMount(ctx, ns, "liar")
		}
		var s svid
		p := &pod{namespace: ns, name: "liar", ip: now.Status.PodIP}
		if err := p.do(ctx, "/svid", nil, &s); err != nil {
			return err
		}
		if s.ID != id(ns, "default") {
			t.Fatalf("the liar is %s", s.ID)
		}
		return nil
	})
}

// failedMount returns nil if the pod has an event that its volume could not be
// mounted.
func failedMount(ctx context.Context, ns, name string) error {
	events, err := client.CoreV1().Events(ns).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + name + ",reason=FailedMount"})
	if err == nil && len(events.Items) == 0 {
		err = errors.New("it does not run, and no event says why")
	}
	return err
}

func podUID(t *testing.T, p *pod) string {
	t.Helper()
	now, err := client.CoreV1().Pods(p.namespace).Get(t.Context(), p.name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return string(now.UID)
}

// tokenOf asks the API server for a token of the pod, as the kubelet does.
func tokenOf(t *testing.T, p *pod, account, audience string) string {
	t.Helper()
	seconds := int64(3600)
	got, err := client.CoreV1().ServiceAccounts(p.namespace).CreateToken(t.Context(), account, &authv1.TokenRequest{Spec: authv1.TokenRequestSpec{
		Audiences: []string{audience}, ExpirationSeconds: &seconds,
		BoundObjectRef: &authv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: p.name},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return got.Status.Token
}

// direct speaks to the CA itself, as any pod can.
func direct(t *testing.T) *caclient.Client {
	t.Helper()
	anchor := filepath.Join(t.TempDir(), "root.pem")
	bundle, err := client.CoreV1().ConfigMaps("meshca-agents").Get(t.Context(), "meshca-root", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(anchor, []byte(bundle.Data["root.pem"]), 0o600); err != nil {
		t.Fatal(err)
	}
	service, err := client.CoreV1().Services("meshca-system").Get(t.Context(), "meshca", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	td, err := identity.ParseTrustDomain(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	c, err := caclient.New(caclient.Config{
		Addresses: []string{service.Spec.ClusterIP + ":15012"}, ServerName: "meshca.meshca-system.svc",
		TrustDomain: td, AnchorFile: anchor, Now: time.Now, Dial: node.Dial,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// sign asks the CA for a certificate with a token, for whoever the CSR names.
func sign(ctx context.Context, c *caclient.Client, token, named string) (got identity.ID, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return got, err
	}
	template := &x509.CertificateRequest{}
	if named != "" {
		u, err := url.Parse(named)
		if err != nil {
			return got, err
		}
		template.URIs = []*url.URL{u}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return got, err
	}
	err = c.Sign(ctx, caclient.SignRequest{
		Token: func() (string, error) { return token, nil },
		CSR:   func(context.Context) ([]byte, error) { return csr, nil },
		Accept: func(s *caclient.Signed) error {
			svid, err := identity.NewSVID(s.Chain, key)
			if err == nil {
				got = svid.ID()
			}
			return err
		},
	})
	return got, err
}

func TestT1_T2_TheCASpokenToDirectly(t *testing.T) {
	ns := namespace(t)
	account(t, ns, "victim")
	account(t, ns, "thief")
	pods := start(t, app(ns, "victim", "victim", false), app(ns, "thief", "thief", false))
	victim, thief := pods[0], pods[1]
	ca := direct(t)
	own := tokenOf(t, thief, "thief", "meshca")
	if got, err := sign(t.Context(), ca, own, ""); err != nil || got.String() != id(ns, "thief") {
		t.Fatalf("by its own token the thief is %v, %v", got, err)
	}
	stolen := tokenOf(t, victim, "victim", "meshca")
	if got, err := sign(t.Context(), ca, stolen, ""); err != nil || got.String() != id(ns, "victim") {
		t.Fatalf("while the victim runs, its token makes %v, %v", got, err)
	}
	refused := func(what, token, named string) {
		t.Helper()
		var refusal *caclient.RefusedError
		if got, err := sign(t.Context(), ca, token, named); !errors.As(err, &refusal) {
			t.Errorf("%s: %v, %v; want a refusal", what, got, err)
		}
	}
	refused("a CSR that names the victim", own, id(ns, "victim"))
	refused("a token for another audience", tokenOf(t, thief, "thief", "vault"), "")
	refused("a token for the API server", tokenOf(t, thief, "thief", "https://kubernetes.default.svc.cluster.local"), "")
	refused("no token of ours", "eyJhbGciOiJub25lIn0.e30.", "")

	victim.remove(t)
	eventually(t, 5*time.Second, "the token of a pod that is gone to be refused", func(ctx context.Context) error {
		var refusal *caclient.RefusedError
		got, err := sign(ctx, ca, stolen, "")
		if errors.As(err, &refusal) {
			return nil
		}
		return errors.Join(errors.New("it still makes "+got.String()), err)
	})
	// One that took its name is another.
	start(t, app(ns, "victim", "victim", false))
	refused("the token of the pod that had the name before", stolen, "")
}
