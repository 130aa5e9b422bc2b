package policies

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshca/meshca/policy"
)

// collection holds all policies as the watch reports them. It is the store behind
// a reflector, which calls the methods of [cache.ReflectorStore] from one goroutine.
type collection struct {
	wake func() // something has come in; must not block
	now  func() time.Time

	mu         sync.Mutex
	namespaces map[string]map[string]Object // by namespace and name; none is empty
	count      int
	reached    uint64    // everything up to here has been told
	synced     bool      // there was a whole list
	heard      time.Time // when anything was told last, a bookmark at least each minute
	change     change    // since the last take
}

// change is what has become another.
type change struct {
	// namespaces are those that had a change, even if it was taken back since: who
	// was not told of a number could take what was between for news.
	namespaces map[string]struct{}
	listed     bool // there was a whole list
	lost       bool // policies have disappeared
}

func (c *change) any() bool { return c.listed || len(c.namespaces) > 0 }

func (c *change) in(namespace string) {
	if c.namespaces == nil {
		c.namespaces = make(map[string]struct{})
	}
	c.namespaces[namespace] = struct{}{}
}

// news is a change with what holds since.
type news struct {
	change
	reached  uint64
	count    int
	policies map[string][]policy.Policy // of each namespace with a change; all if listed
}

// progress returns how far the watch has come; ok is false while there is no list,
// or a change that waits to be taken.
func (c *collection) progress() (reached uint64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reached, c.synced && !c.change.any()
}

// age is how long ago anything was told; zero if nothing ever was.
func (c *collection) age() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.heard.IsZero() {
		return 0
	}
	return max(0, c.now().Sub(c.heard))
}

// pending reports whether there is a change to take.
func (c *collection) pending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.synced && c.change.any()
}

// take adds what has changed since it was called last to n, and reports whether
// that was anything.
func (c *collection) take(n *news) (anything bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	anything = c.change.any()
	n.reached, n.count = c.reached, c.count
	n.lost = n.lost || c.change.lost
	if c.change.listed {
		n.listed, n.namespaces, n.policies = true, nil, make(map[string][]policy.Policy)
		for namespace := range c.namespaces {
			n.policies[namespace] = c.policiesLocked(namespace)
		}
	}
	if n.policies == nil {
		n.policies = make(map[string][]policy.Policy)
	}
	for namespace := range c.change.namespaces {
		n.in(namespace)
		n.policies[namespace] = c.policiesLocked(namespace)
	}
	c.change = change{}
	return anything
}

func (c *collection) policiesLocked(namespace string) []policy.Policy {
	all := make([]policy.Policy, 0, len(c.namespaces[namespace]))
	for _, o := range c.namespaces[namespace] {
		all = append(all, o.Policy.Policy)
	}
	return all
}

// objects returns all policies, in the order of [policy.Compare].
func (c *collection) objects() []Object {
	c.mu.Lock()
	all := make([]Object, 0, c.count)
	for _, in := range c.namespaces {
		all = slices.AppendSeq(all, maps.Values(in))
	}
	c.mu.Unlock()
	slices.SortFunc(all, func(a, b Object) int { return policy.Compare(a.Policy.Policy, b.Policy.Policy) })
	return all
}

// Replace takes a whole list. What happened while nobody watched is not known, so
// it counts as a change even if it is the same as before.
func (c *collection) Replace(list []any, version string) error {
	reached, err := number(version)
	if err != nil {
		return err
	}
	next, count := make(map[string]map[string]Object), 0
	for _, item := range list {
		u, ok := item.(*unstructured.Unstructured)
		if !ok {
			return fmt.Errorf("a list of PeerAuthentications holds a %T", item)
		}
		o := decode(u)
		if next[o.Namespace] == nil {
			next[o.Namespace] = make(map[string]Object)
		}
		next[o.Namespace][o.Name] = o
		count++
	}
	c.mu.Lock()
	for namespace, in := range c.namespaces {
		for name := range in {
			if _, ok := next[namespace][name]; !ok {
				c.change.lost = true
			}
		}
	}
	c.namespaces, c.count, c.reached, c.synced = next, count, reached, true
	c.change.listed = true
	c.heard = c.now()
	c.mu.Unlock()
	c.wake()
	return nil
}

// Add takes a policy that has appeared.
func (c *collection) Add(item any) error { return c.Update(item) }

// Update takes a policy that has become another, if only in its status.
func (c *collection) Update(item any) error {
	u, version, err := event(item)
	if err != nil {
		return err
	}
	o := decode(u)
	c.mu.Lock()
	old, had := c.namespaces[o.Namespace][o.Name]
	if !had || !reflect.DeepEqual(old.Policy.Policy, o.Policy.Policy) {
		c.change.in(o.Namespace)
	}
	if c.namespaces[o.Namespace] == nil {
		c.namespaces[o.Namespace] = make(map[string]Object)
	}
	c.namespaces[o.Namespace][o.Name] = o
	if !had {
		c.count++
	}
	c.reached, c.heard = version, c.now()
	c.mu.Unlock()
	c.wake()
	return nil
}

// Delete takes away a policy. Its version is that of the deletion.
func (c *collection) Delete(item any) error {
	u, version, err := event(item)
	if err != nil {
		return err
	}
	namespace, name := u.GetNamespace(), u.GetName()
	c.mu.Lock()
	if in := c.namespaces[namespace]; in != nil {
		if _, had := in[name]; had {
			delete(in, name)
			c.count--
			c.change.in(namespace)
			c.change.lost = true
		}
		if len(in) == 0 {
			delete(c.namespaces, namespace)
		}
	}
	c.reached, c.heard = version, c.now()
	c.mu.Unlock()
	c.wake()
	return nil
}

// Bookmark says that nothing has happened since.
func (c *collection) Bookmark(version string) error {
	reached, err := number(version)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.reached, c.heard = max(c.reached, reached), c.now()
	c.mu.Unlock()
	c.wake()
	return nil
}

// Resync has no meaning here.
func (c *collection) Resync() error { return nil }

func event(item any) (*unstructured.Unstructured, uint64, error) {
	u, ok := item.(*unstructured.Unstructured)
	if !ok {
		return nil, 0, fmt.Errorf("the watch of PeerAuthentications reports a %T", item)
	}
	version, err := number(u.GetResourceVersion())
	return u, version, err
}
