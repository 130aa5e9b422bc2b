package pods

import (
	"context"
	"fmt"
	"net/http"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
)

// The budget of lists and watches, in requests a second. There are four watches, of
// a minute each.
const (
	followQPS   = 10
	followBurst = 20
)

// clients reach the API server: one for pods, whole, one for metadata of the rest.
type clients struct {
	http     *http.Client
	core     rest.Interface
	metadata metadata.Interface
}

// newClients makes clients with a budget of their own. A negative qps is none.
func newClients(base *rest.Config, qps float32, burst int, wrap func(http.RoundTripper) http.RoundTripper) (clients, error) {
	c := rest.CopyConfig(base)
	c.QPS, c.Burst, c.RateLimiter, c.Timeout = qps, burst, nil, 0
	c.Wrap(wrap)
	hc, err := rest.HTTPClientFor(c)
	if err != nil {
		return clients{}, fmt.Errorf("following pods: %w", err)
	}
	md, err := metadata.NewForConfigAndClient(c, hc)
	if err != nil {
		return clients{}, fmt.Errorf("following pods: %w", err)
	}
	// Only what is read is linked: client-go's own set of clients has every group.
	scheme := runtime.NewScheme()
	if err := core.AddToScheme(scheme); err != nil {
		return clients{}, fmt.Errorf("following pods: %w", err)
	}
	c.APIPath, c.GroupVersion = "/api", &core.SchemeGroupVersion
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	c.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	c.ContentType = runtime.ContentTypeProtobuf
	pods, err := rest.RESTClientForConfigAndClient(c, hc)
	if err != nil {
		return clients{}, fmt.Errorf("following pods: %w", err)
	}
	return clients{hc, pods, md}, nil
}

func (c clients) close() { c.http.CloseIdleConnections() }

// feeds are what Run runs.
func (p *Pods) feeds() []*feed {
	return []*feed{
		{
			resource: "pods", table: p.pods, example: &core.Pod{}, trouble: p.trouble,
			list: p.listPods, watch: p.watchPods, begun: p.pods.hear,
		},
		p.metadataFeed("nodes", p.nodes),
		p.metadataFeed("serviceaccounts", p.accounts),
		p.metadataFeed("namespaces", p.namespaces),
	}
}

// listPods slims each page as it comes, so that a list is never there whole.
func (p *Pods) listPods(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
	list := new(core.PodList)
	err := p.followed.core.Get().Resource("pods").VersionedParams(&o, meta.ParameterCodec).Do(ctx).Into(list)
	if err != nil {
		return nil, err
	}
	for i := range list.Items {
		list.Items[i] = slim(&list.Items[i])
	}
	return list, nil
}

func (p *Pods) watchPods(ctx context.Context, o meta.ListOptions) (watch.Interface, error) {
	o.Watch = true
	return p.followed.core.Get().Resource("pods").VersionedParams(&o, meta.ParameterCodec).Watch(ctx)
}

// slim leaves of a pod what podOf reads.
func slim(o *core.Pod) core.Pod {
	return core.Pod{
		ObjectMeta: meta.ObjectMeta{
			UID: o.UID, Namespace: o.Namespace, Name: o.Name, Labels: o.Labels,
			DeletionTimestamp: o.DeletionTimestamp, ResourceVersion: o.ResourceVersion,
		},
		Spec:   core.PodSpec{ServiceAccountName: o.Spec.ServiceAccountName, NodeName: o.Spec.NodeName},
		Status: core.PodStatus{Phase: o.Status.Phase},
	}
}

func (p *Pods) metadataFeed(resource string, t *table[object]) *feed {
	of := p.followed.metadata.Resource(core.SchemeGroupVersion.WithResource(resource))
	return &feed{
		resource: resource, table: t, example: &meta.PartialObjectMetadata{}, trouble: p.trouble, begun: t.hear,
		list: func(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
			list, err := of.List(ctx, o)
			if err != nil {
				return nil, err // a nil pointer in an interface is not nil
			}
			return list, nil
		},
		watch: func(ctx context.Context, o meta.ListOptions) (watch.Interface, error) { return of.Watch(ctx, o) },
	}
}
