package manifest

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
	security "istio.io/api/security/v1beta1"
	istiotype "istio.io/api/type/v1beta1"

	"github.com/meshca/meshca/policy"
)

const (
	maxLabels     = 4096
	maxLabelValue = 63
	// maxProblems bounds what is said about one object.
	maxProblems = 32
)

// unknownMode is outside of Istio's enum, as a newer version's mode would be.
const unknownMode security.PeerAuthentication_MutualTLS_Mode = -1

// reader collects the problems of one PeerAuthentication.
type reader struct {
	version  string
	problems []Problem
}

func (r *reader) say(n *yaml.Node, code string, v Verdict, format string, args ...any) {
	if len(r.problems) < maxProblems {
		r.problems = append(r.problems, Problem{code, v, n.Line, fmt.Sprintf(format, args...)})
	}
}

func (c *Contents) addPolicy(n *yaml.Node, head object) error {
	_, version, _ := strings.Cut(head.apiVersion, "/")
	r := &reader{version: version}
	if version != "v1" && version != "v1beta1" {
		r.say(n, "PV0", Unusable, "API version %q is not known; PeerAuthentication has v1 and v1beta1", cut(head.apiVersion))
	}
	for key := range entries(n) {
		switch key.Value {
		case "apiVersion", "kind", "metadata", "spec", "status":
		default:
			r.say(key, "PV19", Unusable, "unknown field %q%s", cut(key.Value), didYouMean(key.Value, "metadata", "spec"))
		}
	}
	ref, created := r.metadata(n)
	spec := r.spec(get(n, "spec"))
	c.Policies = append(c.Policies, Policy{FromAPI(ref, created, spec), n.Line, r.problems})
	return nil
}

// metadata reads what names a policy and makes it older than another.
func (r *reader) metadata(n *yaml.Node) (ref policy.Ref, created time.Time) {
	meta := get(n, "metadata")
	text := func(key string) string {
		v := get(meta, key)
		if v == nil || isNull(v) {
			return ""
		}
		if v.Kind != yaml.ScalarNode {
			r.say(v, "PV0", Unusable, "metadata.%s: expected one word, found %s", key, describe(v))
			return ""
		}
		if len(v.Value) > 253 || strings.ContainsFunc(v.Value, func(c rune) bool { return c <= ' ' || c == '/' || c >= 0x7f }) {
			r.say(v, "PV0", Unusable, "metadata.%s: %q is no name of an object", key, cut(v.Value))
			return ""
		}
		return v.Value
	}
	ref = policy.Ref{Namespace: text("namespace"), Name: text("name")}
	if ref.Namespace == "" {
		ref.Namespace = "default"
	}
	if ref.Name == "" {
		r.say(n, "PV0", Unusable, "metadata.name is missing")
	}
	if v := get(meta, "creationTimestamp"); v != nil && !isNull(v) {
		t, err := time.Parse(time.RFC3339, v.Value)
		if err != nil {
			r.say(v, "PV0", Unusable, "metadata.creationTimestamp: %s is no time such as 2026-01-31T12:00:00Z", describe(v))
		}
		created = t.UTC().Truncate(time.Second) // the API keeps whole seconds
	}
	return ref, created
}

// mapping returns the value of a key if it is there, and an object.
func (r *reader) mapping(n *yaml.Node, path, key string) *yaml.Node {
	v := get(n, key)
	if v == nil || isNull(v) {
		return nil
	}
	if v.Kind != yaml.MappingNode {
		r.say(v, "PV0", Unusable, "%s.%s: expected keys and values, found %s", path, key, describe(v))
		return nil
	}
	return v
}

// known refuses fields that the schema does not have. The API server would drop
// them, and with a misspelt one what it was to say.
func (r *reader) known(n *yaml.Node, path string, fields ...string) {
	if n == nil {
		return
	}
next:
	for key := range entries(n) {
		for _, f := range fields {
			if key.Value == f {
				continue next
			}
		}
		r.say(key, "PV20", Unusable, "%s: unknown field %q%s; the API server would drop it", path, cut(key.Value), didYouMean(key.Value, fields...))
	}
}

func (r *reader) spec(n *yaml.Node) *security.PeerAuthentication {
	spec := new(security.PeerAuthentication)
	switch {
	case n == nil || isNull(n):
		return spec
	case n.Kind != yaml.MappingNode:
		r.say(n, "PV0", Unusable, "spec: expected keys and values, found %s", describe(n))
		return spec
	}
	r.known(n, "spec", "selector", "mtls", "portLevelMtls")
	labels := r.selector(n)
	if len(labels) > 0 {
		spec.Selector = &istiotype.WorkloadSelector{MatchLabels: labels}
	}
	if mtls := r.mapping(n, "spec", "mtls"); mtls != nil {
		spec.Mtls = r.mtls(mtls, "spec.mtls")
	}
	ports := r.mapping(n, "spec", "portLevelMtls")
	if ports == nil {
		return spec
	}
	if filled(ports) == 0 {
		r.say(ports, "PV7", Rejected, "spec.portLevelMtls: it has no entry; give one, or leave it out")
	}
	if filled(get(get(n, "selector"), "matchLabels")) == 0 {
		code := "PV5"
		if s := get(n, "selector"); s != nil && !isNull(s) {
			code = "PV6"
		}
		r.say(ports, code, Rejected, "spec.portLevelMtls: it needs a selector with labels; policies for a namespace or the mesh have no port-level modes")
	}
	spec.PortLevelMtls = r.ports(ports)
	return spec
}

// filled counts the entries that have a value. The API server drops the others
// before it judges.
func filled(n *yaml.Node) int {
	count := 0
	if n != nil && n.Kind == yaml.MappingNode {
		for _, value := range entries(n) {
			if !isNull(value) {
				count++
			}
		}
	}
	return count
}

// selector returns the labels, as text even where they should have been quoted.
func (r *reader) selector(spec *yaml.Node) map[string]string {
	selector := r.mapping(spec, "spec", "selector")
	if selector == nil {
		return nil
	}
	r.known(selector, "spec.selector", "matchLabels")
	n := r.mapping(selector, "spec.selector", "matchLabels")
	count := filled(n)
	if count == 0 {
		if get(spec, "portLevelMtls") == nil {
			r.say(selector, "PA3", Warned, "spec.selector: a selector without labels chooses every workload; leave it out if that is meant")
		}
		return nil
	}
	if count > maxLabels {
		r.say(n, "PV18", Unusable, "spec.selector.matchLabels: %d labels, at most %d", count, maxLabels)
		return nil
	}
	labels := make(map[string]string, count)
	for key, value := range entries(n) {
		if isNull(value) {
			r.say(value, "PA3", Warned, "spec.selector.matchLabels.%s: a label without a value is dropped, so the policy selects more; an empty value is written \"\"", cut(key.Value))
			continue
		}
		r.label(key, value)
		labels[key.Value] = value.Value
	}
	return labels
}

func (r *reader) label(key, value *yaml.Node) {
	const path = "spec.selector.matchLabels"
	switch {
	case key.Value == "":
		r.say(key, "PV16", Unusable, "%s: a key is empty", path)
	case strings.Contains(key.Value, "*"):
		r.say(key, "PV15", Unusable, "%s: key %q: wildcards are not allowed", path, cut(key.Value))
	}
	switch {
	case value.Kind != yaml.ScalarNode:
		r.say(value, "PV0", Unusable, "%s.%s: expected a text, found %s", path, cut(key.Value), describe(value))
	case strings.Contains(value.Value, "*"):
		r.say(value, "PV14", Unusable, "%s.%s: value %q: wildcards are not allowed", path, cut(key.Value), cut(value.Value))
	case utf8.RuneCountInString(value.Value) > maxLabelValue:
		r.say(value, "PV17", Unusable, "%s.%s: the value has %d characters, at most %d", path, cut(key.Value), utf8.RuneCountInString(value.Value), maxLabelValue)
	case !isString(value):
		r.say(value, "PV0", Rejected, "%s.%s: expected a text, found %s; put it in quotes", path, cut(key.Value), value.Value)
	}
}

func (r *reader) mtls(n *yaml.Node, path string) *security.PeerAuthentication_MutualTLS {
	r.known(n, path, "mode")
	return &security.PeerAuthentication_MutualTLS{Mode: r.mode(get(n, "mode"), path)}
}

func (r *reader) mode(n *yaml.Node, path string) security.PeerAuthentication_MutualTLS_Mode {
	if n == nil || isNull(n) {
		return security.PeerAuthentication_MutualTLS_UNSET
	}
	if !isString(n) {
		r.say(n, "PV4", Unusable, "%s.mode: expected a text, found %s", path, describe(n))
		return unknownMode
	}
	if number, ok := security.PeerAuthentication_MutualTLS_Mode_value[n.Value]; ok {
		return security.PeerAuthentication_MutualTLS_Mode(number)
	}
	code := "PV1"
	switch _, ok := policy.ParseMode(strings.ToUpper(n.Value)); {
	case ok && n.Value != "":
		code = "PV3"
	case r.version == "v1beta1":
		code = "PV2" // not the version that is stored
	}
	r.say(n, code, Newer, "%s.mode: %q is none of UNSET, DISABLE, PERMISSIVE and STRICT; it counts as STRICT", path, cut(n.Value))
	return unknownMode
}

func (r *reader) ports(n *yaml.Node) map[uint32]*security.PeerAuthentication_MutualTLS {
	ports := make(map[uint32]*security.PeerAuthentication_MutualTLS, len(n.Content)/2)
	lines := make(map[uint32]int, len(n.Content)/2)
	for key, value := range entries(n) {
		port, ok := r.port(key)
		path := "spec.portLevelMtls." + cut(key.Value)
		var mtls *security.PeerAuthentication_MutualTLS
		switch {
		case value.Kind == yaml.MappingNode:
			mtls = r.mtls(value, path)
		case !isNull(value):
			r.say(value, "PV0", Unusable, "%s: expected keys and values, found %s", path, describe(value))
		}
		if first, twice := lines[port]; ok && twice {
			r.say(key, "PA6", Unusable, "%s: it is port %d, which stands in line %d already", path, port, first)
		} else if ok {
			ports[port], lines[port] = mtls, key.Line
		}
	}
	return ports
}

// port reads a key such as 8080, "8080" or "08080".
func (r *reader) port(key *yaml.Node) (uint32, bool) {
	const path = "spec.portLevelMtls"
	text := asKey(key)
	port, err := strconv.ParseInt(text, 10, 64)
	switch {
	case err != nil || strings.HasPrefix(text, "+"):
		code := "PV12"
		if isPortName(text) {
			code = "PV13"
		}
		r.say(key, code, Unusable, "%s: %q is no number; ports are named by the number that the workload listens on", path, cut(text))
		return 0, false
	case port < 0:
		r.say(key, "PV11", Unusable, "%s: port %d: it must be 1 to 65535", path, port)
		return 0, false
	case port == 0:
		r.say(key, "PV8", Unusable, "%s: port 0: it must be 1 to 65535", path)
		return 0, false
	case port > 65535:
		code := "PV10"
		if port == 65536 {
			code = "PV9"
		}
		r.say(key, code, Unusable, "%s: port %d: it must be 1 to 65535", path, port)
		return 0, false
	}
	return uint32(port), true
}

// isPortName tells the names that Kubernetes ports usually have, protocol or
// protocol-something, from other words.
func isPortName(s string) bool {
	protocol, _, _ := strings.Cut(s, "-")
	switch protocol {
	case "http", "http2", "https", "grpc", "tcp", "tls", "udp", "mongo", "mysql", "redis", "metrics", "web", "admin":
		return true
	}
	return false
}

func didYouMean(got string, fields ...string) string {
	for _, f := range fields {
		if strings.EqualFold(f, got) {
			return fmt.Sprintf("; did you mean %q?", f)
		}
	}
	return ""
}
