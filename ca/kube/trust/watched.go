package trust

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// watched is what the cluster holds, kept current by watches: all namespaces, and
// of the other objects only those with our names, which is also all that the
// permissions allow.
//
// Each kind goes on by itself: one that may not be read, or is not served, keeps
// nothing from the others.
type watched struct {
	d          *Distributor
	queue      workqueue.TypedRateLimitingInterface[key]
	namespaces cache.SharedIndexInformer
	factories  []informers.SharedInformerFactory

	mu      sync.Mutex // guards what follows: ClusterTrustBundles may come later
	objects map[kind]cache.SharedIndexInformer
}

// prepare makes the informers of what every API server has; nothing is asked yet.
func (w *watched) prepare() error {
	w.objects = make(map[kind]cache.SharedIndexInformer)
	w.namespaces = w.factory("").Core().V1().Namespaces().Informer()
	if err := w.add(w.namespaces, "namespaces", func(o metav1.Object) []key { return w.keysOf(o.GetName()) }); err != nil {
		return err
	}
	configMaps := []kind{kindConfigMap}
	if w.d.conf.IstioCompatibility {
		configMaps = append(configMaps, kindIstio)
	}
	for _, k := range configMaps {
		name := key{kind: k}.name()
		cm := w.factory(name).Core().V1().ConfigMaps().Informer()
		w.objects[k] = cm
		if err := w.add(cm, "configmaps "+name, func(o metav1.Object) []key { return []key{{k, o.GetNamespace()}} }); err != nil {
			return err
		}
	}
	return nil
}

// run follows the objects until ctx is done.
func (w *watched) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() {
		cancel()
		for _, f := range w.factories {
			f.Shutdown()
		}
		wg.Wait()
	}()
	for _, f := range w.factories {
		f.StartWithContext(ctx)
	}
	for _, i := range append([]cache.SharedIndexInformer{w.namespaces}, w.informers()...) {
		wg.Go(func() { w.enqueueWhenSynced(ctx, i) })
	}
	return w.followTrustBundles(ctx)
}

func (w *watched) informers() []cache.SharedIndexInformer {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Values(w.objects))
}

// enqueueWhenSynced is for keys that came before their kind was known.
func (w *watched) enqueueWhenSynced(ctx context.Context, i cache.SharedIndexInformer) {
	if cache.WaitForCacheSync(ctx.Done(), i.HasSynced) {
		w.enqueueAll()
	}
}

// followTrustBundles waits until the API server has ClusterTrustBundles, which an
// upgrade may bring, and follows ours.
func (w *watched) followTrustBundles(ctx context.Context) error {
	tick := time.NewTicker(w.d.conf.Discovery)
	defer tick.Stop()
	for first := true; !w.served(ctx, first); first = false {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	f := w.factoryOf(TrustBundleName)
	bundles := f.Certificates().V1().ClusterTrustBundles().Informer()
	if err := w.add(bundles, "clustertrustbundles", func(metav1.Object) []key { return []key{{kind: kindTrustBundle}} }); err != nil {
		return err
	}
	w.mu.Lock()
	w.objects[kindTrustBundle] = bundles
	w.mu.Unlock()
	f.StartWithContext(ctx)
	defer f.Shutdown()
	w.enqueueWhenSynced(ctx, bundles)
	<-ctx.Done()
	return nil
}

// served asks whether there are ClusterTrustBundles, and says so once if not.
func (w *watched) served(ctx context.Context, say bool) bool {
	group := certificatesv1.SchemeGroupVersion.String()
	what := "discovery of " + group
	list, err := w.d.conf.Client.Discovery().ServerResourcesForGroupVersion(group)
	if err != nil && !apierrors.IsNotFound(err) {
		if ctx.Err() == nil {
			w.d.failing(what, fmt.Errorf("%s: %w", what, err), func() bool { return true })
		}
		return false
	}
	w.d.found(what)
	if err == nil && slices.ContainsFunc(list.APIResources, func(r metav1.APIResource) bool { return r.Name == "clustertrustbundles" }) {
		return true
	}
	if say {
		w.d.log.Info("the API server does not serve ClusterTrustBundles; the bundle goes into ConfigMaps alone until it does", "group", group)
	}
	return false
}

// factory is one that run starts.
func (w *watched) factory(name string) informers.SharedInformerFactory {
	f := w.factoryOf(name)
	w.factories = append(w.factories, f)
	return f
}

// factoryOf makes informers of the objects with one name, or of all.
func (w *watched) factoryOf(name string) informers.SharedInformerFactory {
	var options []informers.SharedInformerOption
	if name != "" {
		options = append(options, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()
		}))
	}
	return informers.NewSharedInformerFactoryWithOptions(w.d.conf.Client, 0, options...)
}

// add has every change of an informer's objects enqueue the keys that it concerns.
func (w *watched) add(i cache.SharedIndexInformer, what string, keys func(metav1.Object) []key) error {
	err := i.SetWatchErrorHandlerWithContext(func(ctx context.Context, _ *cache.Reflector, err error) {
		if ctx.Err() == nil && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
			// Nothing tells that a watch goes on again but that it gets further, which
			// it does by the bookmarks that it is sent where nothing changes.
			version := i.LastSyncResourceVersion()
			w.d.failing(what, fmt.Errorf("following %s: %w", what, err), func() bool {
				return !i.HasSynced() || i.LastSyncResourceVersion() == version
			})
		}
	})
	if err != nil {
		return err
	}
	enqueue := func(o any) {
		if d, ok := o.(cache.DeletedFinalStateUnknown); ok {
			o = d.Obj
		}
		if m, ok := o.(metav1.Object); ok {
			for _, k := range keys(m) {
				w.queue.Add(k)
			}
		}
	}
	_, err = i.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: enqueue, UpdateFunc: func(_, o any) { enqueue(o) }, DeleteFunc: enqueue,
	})
	return err
}

// keysOf are the objects that a namespace may have.
func (w *watched) keysOf(namespace string) []key {
	keys := []key{{kindConfigMap, namespace}}
	if w.d.conf.IstioCompatibility {
		keys = append(keys, key{kindIstio, namespace})
	}
	return keys
}

func (w *watched) enqueueAll() {
	// The agents' namespace is served without knowing the others.
	for _, ns := range append(w.namespaces.GetIndexer().ListKeys(), w.d.conf.Namespace) {
		for _, k := range w.keysOf(ns) {
			w.queue.Add(k)
		}
	}
	w.queue.Add(key{kind: kindTrustBundle})
}

// find returns what is there under a key, nil if nothing is, and whether something
// should be. known is false as long as that cannot be said.
func (w *watched) find(k key) (have *object, wanted, known bool) {
	w.mu.Lock()
	informer := w.objects[k.kind]
	w.mu.Unlock()
	if informer == nil || !informer.HasSynced() {
		return nil, false, false
	}
	path := k.name()
	if k.namespace != "" {
		path = k.namespace + "/" + path
	}
	found, _, _ := informer.GetIndexer().GetByKey(path) // an Indexer has no errors
	switch o := found.(type) {
	case *corev1.ConfigMap:
		text := o.Data[ConfigMapKey]
		if k.kind == kindIstio {
			text = o.Data[IstioKey]
		}
		have = &object{meta: &o.ObjectMeta, text: text}
	case *certificatesv1.ClusterTrustBundle:
		have = &object{meta: &o.ObjectMeta, text: o.Spec.TrustBundle}
	}
	if k.kind == kindTrustBundle {
		return have, true, true
	}
	if !w.namespaces.HasSynced() {
		ours := k.namespace == w.d.conf.Namespace
		return have, ours, ours
	}
	found, _, _ = w.namespaces.GetIndexer().GetByKey(k.namespace)
	ns, ok := found.(*corev1.Namespace)
	return have, ok && w.d.wants(ns, k.kind), true
}

// failing notes that a source cannot be followed, for as long as that stands.
func (d *Distributor) failing(what string, err error, stands func() bool) {
	now := d.conf.Now()
	d.mu.Lock()
	was := d.sources[what]
	d.sources[what] = fault{err, now, stands}
	d.mu.Unlock()
	if was.err == nil || was.err.Error() != err.Error() || now.Sub(was.at) >= sayAgain {
		d.log.Warn("the trust bundle is distributed by what was known last", "source", what, "condition", string(failing), "error", err)
	}
}

// found takes back that a source is failing.
func (d *Distributor) found(what string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.sources, what)
}

func outrun(err error) bool { return apierrors.IsConflict(err) }
