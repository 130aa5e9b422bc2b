package rights

import (
	"fmt"
	"slices"
	"strings"
)

// Right is one thing that may be done.
type Right struct {
	Verb      string
	Group     string
	Resource  string // with its subresource, such as peerauthentications/status
	Name      string // empty: any
	Namespace string // empty: in all
	URL       string // in place of a resource
}

func (r Right) String() string {
	if r.URL != "" {
		return r.Verb + " " + r.URL
	}
	s := r.Verb + " " + r.Resource
	if r.Group != "" {
		resource, sub, found := strings.Cut(r.Resource, "/")
		if found {
			sub = "/" + sub
		}
		s = r.Verb + " " + resource + "." + r.Group + sub
	}
	if r.Name != "" {
		s += fmt.Sprintf(" %q", r.Name)
	}
	if r.Namespace != "" {
		s += " in namespace " + r.Namespace
	}
	return s
}

// Options are the settings that rights depend on.
type Options struct {
	Namespace          string // the CA's own
	TokenReview        bool   // callers: tokenreview
	IstioCompatibility bool
	Upstream           bool // the root is not the CA's own
}

// rule is written as a ClusterRole's is, and spread out by CA.
type rule struct {
	namespace string
	group     string
	resources []string
	names     []string
	verbs     []string
}

// roots is how many root Secrets the CA can read. The Role must name one more than
// there ever are.
const roots = 8

// replicas is how many replicas can tell what they know.
const replicas = 16

// CA is all that the CA's ServiceAccount may do.
func CA(o Options) []Right {
	ns := o.Namespace
	anchors := []string{"meshca-root"}
	if o.IstioCompatibility {
		anchors = append(anchors, "istio-ca-root-cert")
	}
	var secrets []string
	for n := 1; n <= roots; n++ {
		secrets = append(secrets, fmt.Sprintf("meshca-root-%d", n))
	}
	var slots []string
	for n := 1; n <= replicas; n++ {
		slots = append(slots, fmt.Sprintf("meshca-replica-%d", n))
	}
	root := []rule{
		{ns, "", []string{"secrets", "configmaps"}, nil, []string{"create"}},
		{ns, "", []string{"secrets"}, secrets, []string{"get"}},
		{ns, "", []string{"configmaps"}, []string{"meshca-roots", "meshca-state", "meshca-policies"}, []string{"get", "update"}},
	}
	if o.Upstream {
		root = []rule{
			{ns, "", []string{"configmaps"}, nil, []string{"create"}},
			{ns, "", []string{"configmaps"}, []string{"meshca-bundle", "meshca-policies"}, []string{"get", "update"}},
			{ns, "", []string{"configmaps"}, []string{"meshca-roots"}, []string{"get"}},
		}
	}
	rules := slices.Concat([]rule{
		{"", "", []string{"pods", "nodes", "namespaces", "serviceaccounts"}, nil, []string{"get", "list", "watch"}},
		{"", "security.istio.io", []string{"peerauthentications"}, nil, []string{"list", "watch"}},
		{"", "security.istio.io", []string{"peerauthentications/status"}, nil, []string{"patch"}},
		{"", "apiextensions.k8s.io", []string{"customresourcedefinitions"}, nil, []string{"create"}},
		{"", "apiextensions.k8s.io", []string{"customresourcedefinitions"}, []string{"peerauthentications.security.istio.io"}, []string{"get", "update"}},
		{"", "", []string{"configmaps"}, anchors, []string{"list", "watch", "create", "patch"}},
		{"", "certificates.k8s.io", []string{"clustertrustbundles"}, []string{"meshca.dev:workload:root"}, []string{"list", "watch", "create", "patch"}},
		{"", "certificates.k8s.io", []string{"signers"}, []string{"meshca.dev/workload"}, []string{"attest"}},
		{"", "events.k8s.io", []string{"events"}, nil, []string{"create", "patch"}},
	}, root, []rule{
		{ns, "", []string{"configmaps"}, slots, []string{"get", "update"}},
		{ns, "coordination.k8s.io", []string{"leases"}, nil, []string{"create"}},
		{ns, "coordination.k8s.io", []string{"leases"}, []string{"meshca-leader"}, []string{"get", "update"}},
	})
	var all []Right
	if o.TokenReview {
		rules = append(rules, rule{"", "authentication.k8s.io", []string{"tokenreviews"}, nil, []string{"create"}})
	} else {
		all = append(all, Right{Verb: "get", URL: "/openid/v1/jwks"})
	}
	for _, r := range rules {
		all = append(all, r.spread()...)
	}
	return all
}

func (r rule) spread() []Right {
	names := r.names
	if len(names) == 0 {
		names = []string{""}
	}
	var all []Right
	for _, resource := range r.resources {
		for _, name := range names {
			for _, verb := range r.verbs {
				all = append(all, Right{Verb: verb, Group: r.group, Resource: resource, Name: name, Namespace: r.namespace})
			}
		}
	}
	return all
}
