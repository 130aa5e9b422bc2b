package conf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// maxFile bounds a configuration file before it is parsed.
const maxFile = 1 << 20

// File remembers where in a configuration file each key stands, so that what
// is found wrong later can still be reported by line.
type File struct {
	name  string
	lines map[string]int // key path ("leaf.lifetime", "token_issuers[0].issuer") to line
}

// Error is one mistake in a configuration file.
type Error struct {
	File string
	Line int    // 0 where the mistake is that something is missing
	Key  string // path of the key; empty for a mistake of syntax
	Text string
}

func (e *Error) Error() string {
	where := e.File
	if e.Line > 0 {
		where += ":" + strconv.Itoa(e.Line)
	}
	if e.Key != "" {
		return fmt.Sprintf("%s: %s: %s", where, e.Key, e.Text)
	}
	return where + ": " + e.Text
}

// Load reads the YAML file at path into the struct that into points to. Keys
// that the file leaves out keep the value that the struct came with. An unknown
// or repeated key, a value of the wrong kind, an anchor, an alias, or a second
// document is an [*Error].
//
// Fields may be strings, bools, ints, time.Durations, slices, maps with string
// keys, and structs; each needs a `yaml` tag.
func Load(path string, into any) (*File, error) {
	data, err := readCapped(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w; write it, or give the path of another with --config", err)
	}
	f := &File{name: filepath.Base(path), lines: map[string]int{}}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return f, nil // an empty file says nothing, so every default holds
	case err != nil:
		return nil, f.syntax(err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, &Error{File: f.name, Text: "it holds more than one document; only one is read"}
	}
	if err := f.decode(doc.Content[0], "", reflect.ValueOf(into).Elem()); err != nil {
		return nil, err
	}
	return f, nil
}

// Errorf returns an [*Error] about the key at path, with the line where it
// stands. It works on a nil File too, for a start without a file.
func (f *File) Errorf(key, format string, args ...any) error {
	e := &Error{File: "configuration", Key: key, Text: fmt.Sprintf(format, args...)}
	if f != nil {
		e.File, e.Line = f.name, f.lines[key]
	}
	return e
}

// Has reports whether the file itself gives the key.
func (f *File) Has(key string) bool {
	if f == nil {
		return false
	}
	_, ok := f.lines[key]
	return ok
}

func readCapped(path string) ([]byte, error) {
	r, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%q has more than %d bytes", path, maxFile)
	}
	return data, nil
}

// syntax turns yaml's "yaml: line 3: …" into our form.
func (f *File) syntax(err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	e := &Error{File: f.name, Text: text}
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if n, what, ok := strings.Cut(rest, ": "); ok {
			if line, err := strconv.Atoi(n); err == nil {
				e.Line, e.Text = line, what
			}
		}
	}
	return e
}

func (f *File) decode(n *yaml.Node, key string, v reflect.Value) error {
	if key != "" {
		if _, seen := f.lines[key]; !seen {
			f.lines[key] = n.Line
		}
	}
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		return f.at(n, key, "anchors and aliases are not supported; write the value out")
	}
	switch {
	case v.Type() == reflect.TypeFor[time.Duration]():
		return f.decodeDuration(n, key, v)
	case v.Kind() == reflect.Struct:
		return f.decodeStruct(n, key, v)
	case v.Kind() == reflect.Slice:
		return f.decodeSlice(n, key, v)
	case v.Kind() == reflect.Map:
		return f.decodeMap(n, key, v)
	}
	return f.decodeScalar(n, key, v)
}

func (f *File) decodeStruct(n *yaml.Node, key string, v reflect.Value) error {
	if n.Kind != yaml.MappingNode {
		return f.at(n, key, "expected keys and values, found %s", kind(n))
	}
	seen := map[string]int{}
	for i := 0; i < len(n.Content); i += 2 {
		k, val := n.Content[i], n.Content[i+1]
		if first, dup := seen[k.Value]; dup {
			return f.at(k, join(key, k.Value), "this key stands in line %d already", first)
		}
		seen[k.Value] = k.Line
		field, ok := fieldByTag(v, k.Value)
		if !ok {
			return f.at(k, "", "unknown key %q%s", join(key, k.Value), suggest(v.Type(), k.Value))
		}
		f.lines[join(key, k.Value)] = k.Line
		if err := f.decode(val, join(key, k.Value), field); err != nil {
			return err
		}
	}
	return nil
}

func (f *File) decodeSlice(n *yaml.Node, key string, v reflect.Value) error {
	if n.Kind != yaml.SequenceNode {
		return f.at(n, key, "expected a list, found %s", kind(n))
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, item := range n.Content {
		if err := f.decode(item, fmt.Sprintf("%s[%d]", key, i), out.Index(i)); err != nil {
			return err
		}
	}
	v.Set(out)
	return nil
}

func (f *File) decodeMap(n *yaml.Node, key string, v reflect.Value) error {
	if n.Kind != yaml.MappingNode {
		return f.at(n, key, "expected keys and values, found %s", kind(n))
	}
	// A map in the file replaces the default whole: merging would leave no way
	// to take a default entry away.
	out := reflect.MakeMap(v.Type())
	for i := 0; i < len(n.Content); i += 2 {
		k, val := n.Content[i], n.Content[i+1]
		kv := reflect.ValueOf(k.Value)
		if out.MapIndex(kv).IsValid() {
			return f.at(k, join(key, k.Value), "this key stands there twice")
		}
		item := reflect.New(v.Type().Elem()).Elem()
		f.lines[join(key, k.Value)] = k.Line
		if err := f.decode(val, join(key, k.Value), item); err != nil {
			return err
		}
		out.SetMapIndex(kv, item)
	}
	v.Set(out)
	return nil
}

func (f *File) decodeDuration(n *yaml.Node, key string, v reflect.Value) error {
	d, err := time.ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		return f.at(n, key, "bad duration %s; write a number and a unit, such as 90s, 10m or 72h", shown(n.Value))
	}
	if d < 0 {
		return f.at(n, key, "duration %q is negative", n.Value)
	}
	v.SetInt(int64(d))
	return nil
}

func (f *File) decodeScalar(n *yaml.Node, key string, v reflect.Value) error {
	if n.Kind != yaml.ScalarNode {
		return f.at(n, key, "expected one value, found %s", kind(n))
	}
	switch v.Kind() {
	case reflect.String:
		// YAML reads an unquoted 1.0 or true as a number or a boolean; as a
		// name it is meant as it stands. Only nothing at all is an error.
		if n.Tag == "!!null" {
			return f.at(n, key, "no value; remove the key or give it one")
		}
		v.SetString(n.Value)
	case reflect.Bool:
		if n.Tag != "!!bool" {
			return f.at(n, key, "expected true or false, found %s", shown(n.Value))
		}
		v.SetBool(strings.EqualFold(n.Value, "true"))
	case reflect.Int:
		i, err := strconv.ParseInt(n.Value, 10, 64)
		if err != nil {
			return f.at(n, key, "expected a whole number, found %s", shown(n.Value))
		}
		v.SetInt(i)
	default:
		return f.at(n, key, "settings of type %s cannot be read", v.Type())
	}
	return nil
}

func (f *File) at(n *yaml.Node, key, format string, args ...any) error {
	return &Error{File: f.name, Line: n.Line, Key: key, Text: fmt.Sprintf(format, args...)}
}

func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "keys and values"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
		return shown(n.Value)
	}
	return "something else"
}

// shown quotes a value, if it is short: a long one in a wrong place may be a
// token or a key, such as when the flag for the file was given another's path.
func shown(value string) string {
	const most = 16
	if len(value) > most {
		return fmt.Sprintf("a value of %d bytes", len(value))
	}
	return strconv.Quote(value)
}

func join(key, name string) string {
	if key == "" {
		return name
	}
	return key + "." + name
}
