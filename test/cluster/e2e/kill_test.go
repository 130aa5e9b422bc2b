package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// processes returns the ids of the processes on this machine that run a program of
// an image, by the name that it has there.
func processes(t *testing.T, program string) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var ids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && strings.HasPrefix(string(cmdline), program+"\x00") {
			ids = append(ids, pid)
		}
	}
	return ids
}

// kill9 kills one process of a program as nothing in it can see coming.
func kill9(t *testing.T, program string) {
	t.Helper()
	ids := processes(t, program)
	if len(ids) == 0 {
		t.Fatalf("%s does not run", program)
	}
	if err := syscall.Kill(ids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// killAgent kills the agent, and leaves alone what starts it again in its container.
func killAgent(t *testing.T) {
	t.Helper()
	for _, pid := range processes(t, "/agent") {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || strings.Contains(string(cmdline), "\x00--supervise") {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("no agent runs")
}

// killContainer kills the first process of the agent's container, and all with it.
func killContainer(t *testing.T) {
	t.Helper()
	for _, pid := range processes(t, "/agent") {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && strings.Contains(string(cmdline), "\x00--supervise") {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("no agent is supervised")
}

// traffic is mutual TLS between two pods that goes on until it is stopped.
type traffic struct {
	wg       sync.WaitGroup
	stop     chan struct{}
	requests int
	failed   []error
}

func (tr *traffic) start(ctx context.Context, from, to *pod, account string) {
	tr.stop = make(chan struct{})
	tr.wg.Go(func() {
		for {
			select {
			case <-tr.stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			tr.requests++
			// The program at the other end holds what it was given; the one here asks the
			// agent anew each time, and waits for it as a program's start would.
			if _, err := from.get(ctx, "https://"+to.ip+":8443/", id(to.namespace, account)); err != nil {
				tr.failed = append(tr.failed, err)
			}
		}
	})
}

func (tr *traffic) end() { close(tr.stop); tr.wg.Wait() }

// newSVID has a new client ask the pod's socket, and returns when it was answered.
func newSVID(t *testing.T, p *pod, within time.Duration, want string) time.Duration {
	t.Helper()
	began := time.Now()
	eventually(t, within, "a new client to be served in pod "+p.name, func(ctx context.Context) error {
		var s svid
		if err := p.do(ctx, "/svid", nil, &s); err != nil {
			return err
		}
		if s.ID != want {
			t.Fatalf("pod %s is %s, want %s", p.name, s.ID, want)
		}
		return nil
	})
	return time.Since(began)
}

func TestF36_AgentKilled(t *testing.T) {
	ns := namespace(t)
	pods := start(t, app(ns, "one", "default", true), app(ns, "two", "default", true))
	one, two := pods[0], pods[1]
	before := one.svid(t)
	two.svid(t)
	var tr traffic
	tr.start(t.Context(), two, one, "default")
	// Whenever it is killed, as often as it is killed.
	for range 3 {
		killAgent(t)
		took := newSVID(t, one, 2*time.Second, id(ns, "default"))
		t.Logf("the agent was killed; a new client was served after %v", took)
	}
	// With all that is in its container: the kubelet starts it again, and one that has
	// not failed before at once.
	killContainer(t)
	took := newSVID(t, one, 5*time.Second, id(ns, "default"))
	t.Logf("the agent's container was killed; a new client was served after %v", took)
	after := one.svid(t)
	if after.Serial == before.Serial {
		t.Error("the successor hands out a key that it cannot have: the certificate is the one from before")
	}
	tr.end()
	if len(tr.failed) > 0 {
		t.Logf("%d of %d requests failed, each by a new client: %v", len(tr.failed), tr.requests, tr.failed[0])
	}
	// Its pod replaced, as an update does.
	old, err := client.CoreV1().Pods("meshca-agents").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(old.Items) != 1 {
		t.Fatalf("%d agents, %v", len(old.Items), err)
	}
	if err := client.CoreV1().Pods("meshca-agents").Delete(t.Context(), old.Items[0].Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "another agent", func(ctx context.Context) error {
		now, err := client.CoreV1().Pods("meshca-agents").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, p := range now.Items {
			if p.UID != old.Items[0].UID && len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].Ready {
				return nil
			}
		}
		return errors.New("there is none that is ready")
	})
	newSVID(t, one, 2*time.Second, id(ns, "default"))
	// And volumes come and go as before.
	start(t, app(ns, "three", "default", true))[0].svid(t)
}

func TestF15_EveryCAKilled(t *testing.T) {
	ns := namespace(t)
	one := start(t, app(ns, "one", "default", true))[0]
	before := one.svid(t)
	for range 2 {
		kill9(t, "/meshca")
	}
	if got := one.svid(t); got.Serial != before.Serial {
		t.Error("without a CA the pod has another certificate")
	}
	// A pod that starts now has its identity once there is a CA again, by itself.
	began := time.Now()
	two := start(t, app(ns, "two", "default", true))[0]
	s := two.svid(t)
	t.Logf("both CAs were killed; a pod that started then had its SVID after %v", time.Since(began))
	if string(s.Roots[0]) != string(before.Roots[0]) {
		t.Error("the CAs came back with another root")
	}
}

func TestF26_ControlPlaneKilled(t *testing.T) {
	ns := namespace(t)
	pods := start(t, app(ns, "one", "default", true), app(ns, "two", "default", true))
	one, two := pods[0], pods[1]
	one.svid(t)
	two.svid(t)
	var tr traffic
	tr.start(t.Context(), two, one, "default")
	for _, name := range []string{"kube-apiserver", "etcd", "kubelet"} {
		c := node.Component(name)
		if err := c.Kill(); err != nil {
			t.Fatal(err)
		}
		// What needs no control plane goes on without.
		newSVID(t, one, 2*time.Second, id(ns, "default"))
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, time.Minute, "the API server after "+name+" was killed", func(ctx context.Context) error {
			_, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
			return err
		})
		p := start(t, app(ns, "after-"+strings.TrimPrefix(name, "kube-"), "default", true))[0]
		p.svid(t)
	}
	tr.end()
	if len(tr.failed) > 0 {
		t.Errorf("%d of %d requests failed while parts of Kubernetes were killed: %v", len(tr.failed), tr.requests, tr.failed[0])
	}
	eventually(t, 30*time.Second, "both CAs to be ready", func(ctx context.Context) error {
		d, err := client.AppsV1().Deployments("meshca-system").Get(ctx, "meshca", metav1.GetOptions{})
		if err == nil && d.Status.ReadyReplicas != 2 {
			err = fmt.Errorf("%d are", d.Status.ReadyReplicas)
		}
		return err
	})
}
