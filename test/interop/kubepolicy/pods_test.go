package kubepolicy

import (
	"context"
	"maps"
	"strconv"
	"sync"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
)

// livePods are the labels of all pods, from the API server.
type livePods struct {
	client dynamic.Interface

	mu     sync.Mutex
	all    map[string]livePod
	notify func(string)
}

type livePod struct {
	namespace string
	labels    map[string]string
	version   uint64
}

func newLivePods(c dynamic.Interface) *livePods {
	return &livePods{client: c, all: make(map[string]livePod), notify: func(string) {}}
}

func (p *livePods) Labels(uid string) (namespace string, labels map[string]string, version uint64, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pod, known := p.all[uid]
	return pod.namespace, pod.labels, pod.version, known
}

func (p *livePods) Notify(f func(string)) { p.notify = f }

func (p *livePods) run(ctx context.Context) error {
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
			return p.client.Resource(podResource).List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o meta.ListOptions) (watch.Interface, error) {
			return p.client.Resource(podResource).Watch(ctx, o)
		},
	}
	cache.NewReflectorWithOptions(lw, nil, p, cache.ReflectorOptions{Name: "pods"}).RunWithContext(ctx)
	return nil
}

func podOf(item any) (uid string, pod livePod) {
	u := item.(*unstructured.Unstructured)
	version, _ := strconv.ParseUint(u.GetResourceVersion(), 10, 64)
	return string(u.GetUID()), livePod{u.GetNamespace(), u.GetLabels(), version}
}

func (p *livePods) Update(item any) error {
	uid, pod := podOf(item)
	p.mu.Lock()
	news := !maps.Equal(p.all[uid].labels, pod.labels) || p.all[uid].version == 0
	p.all[uid] = pod
	p.mu.Unlock()
	if news {
		p.notify(uid)
	}
	return nil
}

func (p *livePods) Add(item any) error { return p.Update(item) }

func (p *livePods) Delete(item any) error {
	uid, _ := podOf(item)
	p.mu.Lock()
	delete(p.all, uid)
	p.mu.Unlock()
	p.notify(uid)
	return nil
}

func (p *livePods) Replace(list []any, _ string) error {
	next := make(map[string]livePod, len(list))
	for _, item := range list {
		uid, pod := podOf(item)
		next[uid] = pod
	}
	p.mu.Lock()
	before := p.all
	p.all = next
	p.mu.Unlock()
	for uid := range before {
		p.notify(uid)
	}
	for uid := range next {
		p.notify(uid)
	}
	return nil
}

func (p *livePods) Resync() error { return nil }
