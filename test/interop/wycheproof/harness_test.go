package wycheproof

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	vectors "github.com/c2sp/wycheproof"

	"github.com/meshca/meshca/identity/jwks"
	"github.com/meshca/meshca/identity/token"
)

const (
	issuerURL = "https://tokens.test"
	kid       = "the-key"
)

// read decodes one of Wycheproof's files.
func read(t *testing.T, file string, into any) {
	t.Helper()
	content, err := fs.ReadFile(vectors.TestVectors, file)
	must(t, err)
	must(t, json.Unmarshal(content, into))
}

// names are the files that match a pattern.
func names(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := fs.Glob(vectors.TestVectors, pattern)
	must(t, err)
	if len(found) == 0 {
		t.Fatalf("no file matches %q", pattern)
	}
	return found
}

// published puts a key set where an issuer's would be.
func published(t *testing.T, set []byte) *jwks.Cache {
	t.Helper()
	file := filepath.Join(t.TempDir(), "jwks.json")
	must(t, os.WriteFile(file, set, 0o600))
	cache, err := jwks.New(jwks.Config{Source: jwks.File(file), Issuer: issuerURL})
	must(t, err)
	return cache
}

// keyOf is the key that a set of one JWK yields, or false if it is left out.
func keyOf(t *testing.T, jwk map[string]string) (token.Key, bool) {
	t.Helper()
	jwk["kid"] = kid
	set, err := json.Marshal(map[string]any{"keys": []any{jwk}})
	must(t, err)
	keys, err := published(t, set).Keys(t.Context(), kid)
	if err != nil {
		if !strings.Contains(err.Error(), "none of the 1 keys in the set can be used") {
			t.Fatal(err)
		}
		return token.Key{}, false
	}
	return keys[0], true
}

// number is a hexadecimal integer, written as JWK has it: padded to a size, or
// as short as it can be if the size is 0.
func number(t *testing.T, digits string, size int) string {
	t.Helper()
	n, ok := new(big.Int).SetString(digits, 16)
	if !ok {
		t.Fatalf("%q is no number", digits)
	}
	b := n.Bytes()
	if len(b) < size {
		b = append(make([]byte, size-len(b)), b...)
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

func bytesOf(t *testing.T, digits string) []byte {
	t.Helper()
	b, err := hex.DecodeString(digits)
	must(t, err)
	return b
}

func newVerifier(t *testing.T, keys token.KeySource) *token.Verifier {
	t.Helper()
	v, err := token.New(token.Config{Issuers: []token.Issuer{{
		URL: issuerURL, Keys: keys, Audiences: map[string]time.Duration{"meshca": time.Hour},
	}}})
	must(t, err)
	return v
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tally counts vectors, and disagreements that are listed.
type tally struct {
	run, accepted int
	listed        map[string]string // reasons, by file and number
	seen          map[string]bool
}

func newTally(listed map[string]string) *tally {
	return &tally{listed: listed, seen: make(map[string]bool)}
}

// judge compares a verdict with the one that is wanted.
func (c *tally) judge(t *testing.T, name, comment string, accepted, want bool) {
	t.Helper()
	c.run++
	if accepted {
		c.accepted++
	}
	if accepted == want {
		return
	}
	if c.listed[name] != "" {
		c.seen[name] = true
		return
	}
	t.Errorf("%s (%s): accepted is %t, Wycheproof's verdict makes it %t", name, comment, accepted, want)
}

// atLeast makes sure that the vectors were really run.
func (c *tally) atLeast(t *testing.T, run, accepted int) {
	t.Helper()
	t.Logf("%d vectors run, %d accepted, %d disagreements listed", c.run, c.accepted, len(c.listed))
	if c.run < run || c.accepted < accepted {
		t.Errorf("%d vectors were run and %d accepted; expected at least %d and %d", c.run, c.accepted, run, accepted)
	}
	for name, reason := range c.listed {
		if !c.seen[name] {
			t.Errorf("%s is listed (%s), and there is no disagreement about it any more", name, reason)
		}
	}
}
