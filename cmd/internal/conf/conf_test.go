package conf_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshca/meshca/cmd/internal/conf"
)

type settings struct {
	TrustDomain string `yaml:"trust_domain" doc:"the domain"`
	Leaf        struct {
		Lifetime time.Duration `yaml:"lifetime" doc:"how long"`
	} `yaml:"leaf" doc:"certificates"`
	Count   int  `yaml:"count" doc:"a number"`
	Strict  bool `yaml:"strict" doc:"a switch"`
	Issuers []struct {
		URL       string                   `yaml:"url" doc:"where"`
		Audiences map[string]time.Duration `yaml:"audiences" doc:"for whom"`
	} `yaml:"issuers" doc:"who"`
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "meshca.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoad(t *testing.T) {
	got := settings{Count: 7}
	got.Leaf.Lifetime = time.Hour
	file, err := conf.Load(write(t, `
trust_domain: 1.0
strict: true
issuers:
- url: https://a.example
  audiences: {meshca: 1h, istio-ca: 24h}
`), &got)
	if err != nil {
		t.Fatal(err)
	}
	want := settings{TrustDomain: "1.0", Count: 7, Strict: true}
	want.Leaf.Lifetime = time.Hour
	want.Issuers = append(want.Issuers, struct {
		URL       string                   `yaml:"url" doc:"where"`
		Audiences map[string]time.Duration `yaml:"audiences" doc:"for whom"`
	}{"https://a.example", map[string]time.Duration{"meshca": time.Hour, "istio-ca": 24 * time.Hour}})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("settings differ (-want +got):\n%s", diff)
	}
	if got := file.Errorf("issuers[0].url", "not reachable").Error(); got != "meshca.yaml:5: issuers[0].url: not reachable" {
		t.Errorf("a later error reads %q", got)
	}
	if !file.Has("strict") || file.Has("count") {
		t.Error("Has does not tell given keys from defaults")
	}
}

func TestLoadEmptyFileKeepsDefaults(t *testing.T) {
	got := settings{Count: 7}
	if _, err := conf.Load(write(t, "# nothing\n"), &got); err != nil || got.Count != 7 {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestF63_MistakesAreNamedByFileLineAndKey(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"unknown key, near", "trust_domain: a\ntrust_domian: b", `meshca.yaml:2: unknown key "trust_domian"; did you mean "trust_domain"?`},
		{"unknown key, far", "zzz: 1", `meshca.yaml:1: unknown key "zzz"; known here: trust_domain, leaf, count, strict, issuers`},
		{"unknown key, nested", "leaf:\n  lifetme: 1h", `meshca.yaml:2: unknown key "leaf.lifetme"; did you mean "lifetime"?`},
		{"unknown key, in a list", "issuers:\n- url: x\n- ulr: x", `meshca.yaml:3: unknown key "issuers[1].ulr"; did you mean "url"?`},
		{"repeated key", "count: 1\ncount: 2", `meshca.yaml:2: count: this key stands in line 1 already`},
		{"repeated map key", "issuers:\n- audiences: {a: 1h, a: 2h}", `this key stands there twice`},
		{"bad duration", "leaf:\n  lifetime: 5 minutes", `meshca.yaml:2: leaf.lifetime: bad duration "5 minutes"; write a number and a unit, such as 90s, 10m or 72h`},
		{"duration without unit", "leaf: {lifetime: 90}", `bad duration "90"`},
		{"negative duration", "leaf: {lifetime: -1h}", `duration "-1h" is negative`},
		{"number", "count: many", `meshca.yaml:1: count: expected a whole number, found "many"`},
		{"switch", "strict: 1", `expected true or false, found "1"`},
		{"quoted switch", `strict: "true"`, `expected true or false`},
		{"list for a value", "trust_domain: [a]", `expected one value, found a list`},
		{"value for a section", "leaf: 1h", `meshca.yaml:1: leaf: expected keys and values, found "1h"`},
		{"value for a list", "issuers: a", `issuers: expected a list, found "a"`},
		{"value for a map", "issuers: [{audiences: a}]", `issuers[0].audiences: expected keys and values`},
		{"nothing", "trust_domain:", `trust_domain: no value; remove the key or give it one`},
		{"anchor", "trust_domain: &a x", `anchors and aliases are not supported`},
		{"alias bomb", "trust_domain: x\nissuers: [&a {url: x}, *a]", `anchors and aliases are not supported`},
		{"two documents", "count: 1\n---\ncount: 2", `more than one document`},
		{"syntax", "a: [", `meshca.yaml:1: did not find expected`},
		{"scalar file", "hello", `expected keys and values, found "hello"`},
		{"a token for a file", "eyJhbGciOiJFUzI1NiJ9.e30.c2ln", `expected keys and values, found a value of 29 bytes`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := conf.Load(write(t, tt.text), &settings{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestKeys(t *testing.T) {
	s := settings{}
	s.Leaf.Lifetime = time.Hour
	want := []conf.Key{
		{"trust_domain", "string", "", "the domain"},
		{"leaf", "section", "", "certificates"},
		{"leaf.lifetime", "duration", "1h", "how long"},
		{"count", "int", "", "a number"},
		{"strict", "bool", "", "a switch"},
		{"issuers", "list of sections", "", "who"},
		{"issuers[].url", "string", "", "where"},
		{"issuers[].audiences", "map of durations", "", "for whom"},
	}
	if diff := cmp.Diff(want, conf.Keys(s)); diff != "" {
		t.Errorf("keys differ (-want +got):\n%s", diff)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add("trust_domain: a\nleaf: {lifetime: 1h}\nissuers: [{url: x, audiences: {a: 1h}}]")
	f.Add("a: [")
	f.Add("? [x]\n: y")
	f.Add("<<: {count: 1}")
	f.Add("issuers:\n- &a\n  url: *a")
	f.Fuzz(func(t *testing.T, text string) {
		// Whatever is in the file: settings or an error, never a panic.
		_, _ = conf.Load(write(t, text), &settings{})
	})
}
