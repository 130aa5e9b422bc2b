package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/meshca/meshca/policy"
)

// Contents is what stands in one file, in its order.
type Contents struct {
	Policies []Policy
	Services []Service
	Pods     []Pod
	// Others counts the objects of kinds that are not read, by kind.
	Others map[string]int
	// Objects is the number of all objects, the items of lists among them; Lists that
	// of the lists.
	Objects, Lists int
}

// Policy is a PeerAuthentication and what is to be said about it.
type Policy struct {
	policy.Policy
	Line     int
	Problems []Problem // in the order of their lines
}

// Verdict is how bad a [Problem] is.
type Verdict uint8

const (
	// Warned: the API server accepts the object.
	Warned Verdict = iota
	// Newer: it refuses a mode that it does not know. A newer one may know it, so
	// the policy is usable, with that mode as STRICT.
	Newer
	// Rejected: it refuses the object, but what the object would mean is defined.
	Rejected
	// Unusable: it refuses the object, and nothing says what the object would mean.
	Unusable
)

// Problem is one thing to say about a PeerAuthentication.
type Problem struct {
	// Code is the rule: PV1 to PV20 where the object is refused for it, PV0 where it
	// is not even of the right shape, PA3 and PA6 for what is about acceptable ones.
	Code    string
	Verdict Verdict
	Line    int
	Text    string
}

// Worst returns the gravest verdict on the policy, and the first problem that has
// it. Without problems, ok is false.
func (p Policy) Worst() (worst Problem, ok bool) {
	for i, problem := range p.Problems {
		if i == 0 || problem.Verdict > worst.Verdict {
			worst, ok = problem, true
		}
	}
	return worst, ok
}

// SyntaxError says that a file cannot be read as objects at all.
type SyntaxError struct {
	Line int // 0 where none is to blame
	Text string
}

func (e *SyntaxError) Error() string {
	if e.Line == 0 {
		return e.Text
	}
	return fmt.Sprintf("line %d: %s", e.Line, e.Text)
}

func errorAt(n *yaml.Node, format string, args ...any) error {
	return &SyntaxError{n.Line, fmt.Sprintf(format, args...)}
}

// Parse reads the documents of a file, and the items of lists as kubectl prints
// them. More than maxObjects objects, an alias, a key that stands twice in one
// object, or a document that is no object is a [*SyntaxError]. What is wrong with
// one PeerAuthentication is among its problems.
func Parse(data []byte, maxObjects int) (*Contents, error) {
	c := &Contents{Others: make(map[string]int)}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var doc yaml.Node
		switch err := dec.Decode(&doc); {
		case errors.Is(err, io.EOF):
			return c, nil
		case err != nil:
			return nil, syntax(err)
		}
		if len(doc.Content) == 0 || isNull(doc.Content[0]) {
			continue // nothing between two separators
		}
		if err := c.add(doc.Content[0], object{}, maxObjects); err != nil {
			return nil, err
		}
	}
}

// object is the head that all kinds have.
type object struct{ apiVersion, kind string }

// add reads an object, or the objects of a list. Their kind, where they do not say
// it themselves, is the list's.
func (c *Contents) add(n *yaml.Node, of object, maxObjects int) error {
	if n.Kind != yaml.MappingNode {
		return errorAt(n, "expected an object, found %s", describe(n))
	}
	head := of
	if v := get(n, "apiVersion"); v != nil {
		head.apiVersion = v.Value
	}
	if v := get(n, "kind"); v != nil {
		head.kind = v.Value
	}
	if head.kind == "" || head.apiVersion == "" {
		return errorAt(n, `the object has no "apiVersion" or no "kind"`)
	}
	if strings.HasSuffix(head.kind, "List") {
		if of != (object{}) {
			return errorAt(n, "a list stands in a list")
		}
		return c.addList(n, head, maxObjects)
	}
	if c.Objects++; c.Objects > maxObjects {
		return errorAt(n, "there are more than %d objects", maxObjects)
	}
	group, _, _ := strings.Cut(head.apiVersion, "/")
	read := map[object]func(*yaml.Node) error{
		{"security.istio.io", "PeerAuthentication"}: func(n *yaml.Node) error { return c.addPolicy(n, head) },
		{"v1", "Service"}: c.addService,
		{"v1", "Pod"}:     c.addPod,
	}[object{group, head.kind}]
	if read == nil {
		if group == "security.istio.io" && strings.EqualFold(head.kind, "PeerAuthentication") {
			return errorAt(n, "kind %q: did you mean %q?", head.kind, "PeerAuthentication")
		}
		c.Others[cut(head.kind)]++
		return nil
	}
	if err := plain(n); err != nil {
		return err
	}
	return read(n)
}

func (c *Contents) addList(n *yaml.Node, list object, maxObjects int) error {
	c.Lists++
	items := get(n, "items")
	if items == nil || items.Kind != yaml.SequenceNode {
		return errorAt(n, "%s: its items are missing, or no list", cut(list.kind))
	}
	of := object{list.apiVersion, strings.TrimSuffix(list.kind, "List")}
	if of.kind == "" {
		of.apiVersion = "v1" // of kind List, whose items say what they are; no object{}, so that a list in it is seen
	}
	for _, item := range items.Content {
		if err := c.add(item, of, maxObjects); err != nil {
			return err
		}
	}
	return nil
}

// plain refuses what would let an object mean something else than what it looks
// like: anchors and aliases, which JSON and so the API does not have, and keys that
// stand twice.
func plain(n *yaml.Node) error {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		return errorAt(n, "anchors and aliases are not supported; write the value out")
	}
	if n.Kind == yaml.MappingNode {
		seen := make(map[string]int, len(n.Content)/2)
		for key := range entries(n) {
			if key.Kind != yaml.ScalarNode {
				return errorAt(key, "a key must be one word, found %s", describe(key))
			}
			if first, twice := seen[key.Value]; twice {
				return errorAt(key, "the key %q stands in line %d already", cut(key.Value), first)
			}
			seen[key.Value] = key.Line
		}
	}
	for _, child := range n.Content {
		if err := plain(child); err != nil {
			return err
		}
	}
	return nil
}

// syntax turns yaml's "yaml: line 3: …" into our form.
func syntax(err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if n, what, ok := strings.Cut(rest, ": "); ok {
			if line, err := strconv.Atoi(n); err == nil {
				return &SyntaxError{line, cut(what)}
			}
		}
	}
	return &SyntaxError{0, cut(text)}
}
