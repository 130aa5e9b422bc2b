package conf

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"
)

// Key describes one setting, for the reference documentation.
type Key struct {
	Path    string // "leaf.lifetime", "token_issuers[].issuer"
	Type    string
	Default string // empty for none
	Doc     string
}

// Keys lists the settings of a struct that [Load] fills, in the order of its
// fields; the values that it holds are reported as the defaults.
func Keys(of any) []Key { return keys("", reflect.ValueOf(of)) }

func keys(prefix string, v reflect.Value) []Key {
	var out []Key
	for i := range v.NumField() {
		field := v.Type().Field(i)
		path := join(prefix, field.Tag.Get("yaml"))
		value := v.Field(i)
		k := Key{Path: path, Type: typeName(field.Type), Default: defaultText(value), Doc: field.Tag.Get("doc")}
		out = append(out, k)
		switch {
		case field.Type.Kind() == reflect.Struct:
			out = append(out, keys(path, value)...)
		case field.Type.Kind() == reflect.Slice && field.Type.Elem().Kind() == reflect.Struct:
			out = append(out, keys(path+"[]", reflect.Zero(field.Type.Elem()))...)
		}
	}
	return out
}

func typeName(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "duration"
	case t.Kind() == reflect.Struct:
		return "section"
	case t.Kind() == reflect.Slice:
		return "list of " + typeName(t.Elem()) + "s"
	case t.Kind() == reflect.Map:
		return "map of " + typeName(t.Elem()) + "s"
	}
	return t.Kind().String()
}

func defaultText(v reflect.Value) string {
	switch {
	case v.Kind() == reflect.Struct || v.IsZero():
		return ""
	case v.Type() == reflect.TypeFor[time.Duration]():
		return ShortDuration(time.Duration(v.Int()))
	case v.Kind() == reflect.Map:
		var parts []string
		for _, k := range v.MapKeys() {
			parts = append(parts, fmt.Sprintf("%s: %s", k, defaultText(v.MapIndex(k))))
		}
		slices.Sort(parts)
		return "{" + strings.Join(parts, ", ") + "}"
	}
	return fmt.Sprint(v.Interface())
}

// ShortDuration prints 1h0m0s as 1h, the way a person writes it in a file.
func ShortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func fieldByTag(v reflect.Value, name string) (reflect.Value, bool) {
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("yaml") == name {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

// suggest proposes the known key that is nearest to a mistyped one, if any is
// near enough to be worth proposing; else it lists what there is.
func suggest(t reflect.Type, name string) string {
	var known []string
	best, distance := "", 3
	for i := range t.NumField() {
		tag := t.Field(i).Tag.Get("yaml")
		known = append(known, tag)
		if d := editDistance(name, tag); d < distance {
			best, distance = tag, d
		}
	}
	if best != "" {
		return fmt.Sprintf("; did you mean %q?", best)
	}
	return "; known here: " + strings.Join(known, ", ")
}

// editDistance is Levenshtein's: insertions, deletions and substitutions.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
