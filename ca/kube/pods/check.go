package pods

import (
	"context"
	"fmt"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/metadata"

	"github.com/meshca/meshca/identity/token"
)

// Check returns nil if what a token is bound to still is as the token says: its
// pod lives, runs under the token's ServiceAccount on the token's node, and those
// are the same ones that the token was made for. An error that wraps a
// [caller.UnavailableError] says that this cannot be told now; every other one,
// that it is not so.
func (p *Pods) Check(ctx context.Context, c *token.Claims) error {
	name, uid := c.Pod()
	node, nodeUID := c.Node()
	if uid == "" || nodeUID == "" {
		return fmt.Errorf("the token is bound to no pod on a node, so it cannot be told whether what it was made for still exists")
	}
	pod, ok, err := p.lookUpPod(ctx, node, c.Namespace(), name, uid)
	if err != nil {
		return err
	}
	at := fmt.Sprintf("pod %q with UID %s", c.Namespace()+"/"+name, uid)
	if !ok {
		if pod.UID != "" && pod.UID != uid {
			return fmt.Errorf("%s does not exist any more: the pod of that name has UID %s now", at, pod.UID)
		}
		return fmt.Errorf("%s does not exist any more", at)
	}
	switch why := pod.end(p.now()); {
	case pod.Namespace != c.Namespace() || pod.Name != name:
		return fmt.Errorf("%s is %q in truth", at, pod.Namespace+"/"+pod.Name)
	case why != "":
		return fmt.Errorf("%s has no identity any more: %s", at, why)
	case pod.ServiceAccount != c.ServiceAccount():
		return fmt.Errorf("%s runs under service account %q, and its token is of %q", at, pod.ServiceAccount, c.ServiceAccount())
	case pod.Node != node:
		return fmt.Errorf("%s is on node %q, and its token is for %q", at, pod.Node, node)
	}
	return p.checkAround(ctx, c, pod)
}

// checkAround judges what the pod depends on.
func (p *Pods) checkAround(ctx context.Context, c *token.Claims, pod Pod) error {
	node, nodeUID := c.Node()
	if err := p.same(ctx, p.nodes, "nodes", node, "", node, nodeUID); err != nil {
		return err
	}
	if err := p.same(ctx, p.accounts, "serviceaccounts", node, c.Namespace(), c.ServiceAccount(), c.ServiceAccountUID()); err != nil {
		return err
	}
	// A namespace is terminated by deleting its pods, and those renew until they
	// have drained. A pod that nobody deletes yet is about to be; if it has not
	// begun it should not, and if it has, its certificate runs on.
	ns, ok, err := p.lookUp(ctx, p.namespaces, "namespaces", node, "", c.Namespace(), "")
	switch {
	case err != nil:
		return err
	case !ok:
		return fmt.Errorf("namespace %q does not exist any more", c.Namespace())
	case !ns.Deletion.IsZero() && pod.Deletion.IsZero():
		return fmt.Errorf("namespace %q is being terminated since %s; only pods that drain renew in it", c.Namespace(), stamp(ns.Deletion))
	}
	return nil
}

// same returns an error unless the object of that name is the one with the UID.
func (p *Pods) same(ctx context.Context, t *table[object], resource, asking, namespace, name, uid string) error {
	o, ok, err := p.lookUp(ctx, t, resource, asking, namespace, name, uid)
	switch {
	case err != nil:
		return err
	case ok:
		return nil
	case o.UID != "" && o.UID != uid:
		return fmt.Errorf("the token is for %s %q with UID %s, and the one of that name has UID %s now", resource, keyOf(namespace, name), uid, o.UID)
	}
	return fmt.Errorf("%s %q with UID %s does not exist any more", resource, keyOf(namespace, name), uid)
}

func (p *Pods) lookUpPod(ctx context.Context, node, namespace, name, uid string) (Pod, bool, error) {
	// A token names a node only once its pod has one: what has none is older.
	good := func(f Pod) bool { return f.Node != "" }
	return find(ctx, p.lookups, p.pods, node, uid, uid, good, func(ctx context.Context) (Pod, error) {
		o := new(core.Pod)
		if err := p.live.core.Get().Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(o); err != nil {
			return Pod{}, err
		}
		return podOf(o), nil
	})
}

// lookUp finds an object by name. An empty uid takes any.
func (p *Pods) lookUp(ctx context.Context, t *table[object], resource, node, namespace, name, uid string) (object, bool, error) {
	good := func(o object) bool { return uid == "" || o.UID == uid }
	return find(ctx, p.lookups, t, node, keyOf(namespace, name), uid, good, func(ctx context.Context) (object, error) {
		var of metadata.ResourceInterface = p.live.metadata.Resource(core.SchemeGroupVersion.WithResource(resource))
		if namespace != "" {
			of = p.live.metadata.Resource(core.SchemeGroupVersion.WithResource(resource)).Namespace(namespace)
		}
		o, err := of.Get(ctx, name, meta.GetOptions{})
		if err != nil {
			return object{}, err
		}
		return objectOf(o), nil
	})
}
