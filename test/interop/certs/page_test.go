package certs

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/testenv"
)

var update = flag.Bool("update", false, "write docs/interop.md")

const (
	pageHead = `<!-- Written by the tests: cd test/interop && go test ./certs -update -->

# Who takes our certificates

Each kind of certificate that meshca makes is shown to TLS libraries that we did not write. *path*: their own tool verifies the chain to the root
(OpenSSL with ` + "`-x509_strict`" + `, GnuTLS at its default profile, Java by PKIX). *client*: they dial our side in mutual TLS 1.3. *server*: we dial
them. Both sides verify, and the same handshakes against a peer under another root fail. The CA's own certificate ("serving") is checked on its real port, by
host name. A struck-out word is something that the library refuses, with the reason below; – was not asked.

`
	// What follows the table and cannot be found by asking yes or no.
	pageFoot = `
- The serving certificate is for servers only: as a client's it is refused by OpenSSL and GnuTLS, as it should be.
- At its ` + "`high`" + ` profile (128 bits) GnuTLS refuses RSA-2048 keys; RSA-3072 and the others pass.
- ` + "`openssl`" + ` and ` + "`gnutls-cli`" + ` cannot look for a SPIFFE ID: they prove the chain and leave the identity open. Node, Java and Python leave it to a few lines
  of the program; test/interop/certs/testdata has them.
- zlint finds nothing, warnings included, but for rules of the public web that cannot hold here; test/interop/lint lists them with the reasons.
`
)

// checkPage compares docs/interop.md with what was found, or writes it.
func checkPage(t *testing.T, f *fixture, answers map[string]verdicts) {
	root, err := testenv.RepositoryRoot()
	must(t, err)
	file := filepath.Join(root, "docs", "interop.md")
	for _, l := range libraries() {
		if answers[l.name] == nil {
			t.Logf("without %s the page cannot be checked", l.name)
			return
		}
	}
	page := pageHead + table(f, answers) + pageFoot
	if *update {
		must(t, os.WriteFile(file, []byte(page+"\nLast written with "+versions(t)+".\n"), 0o644))
		return
	}
	have, err := os.ReadFile(file)
	must(t, err)
	// Other versions are fine as long as they say the same.
	if !strings.HasPrefix(string(have), page) {
		t.Errorf("docs/interop.md is not what was found; run this test with -update and look at the difference")
	}
}

func table(f *fixture, answers map[string]verdicts) string {
	var b, notes strings.Builder
	b.WriteString("| certificate |")
	for _, l := range libraries() {
		b.WriteString(" " + l.name + " |")
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(libraries())) + "\n")
	for _, k := range f.kinds {
		if k.foreign {
			continue
		}
		b.WriteString("| " + k.name + " |")
		for _, l := range libraries() {
			var words []string
			for _, what := range k.questions() {
				reason, asked := answers[l.name][cell{k.name, what}]
				switch {
				case !asked || what == path && l.noPaths:
				case reason == "":
					words = append(words, what)
				default:
					words = append(words, "~~"+what+"~~")
					fmt.Fprintf(&notes, "- %s, %s as %s: %s\n", l.name, k.name, what, l.refuses[cell{k.name, what}])
				}
			}
			if len(words) == 0 {
				words = []string{"–"}
			}
			b.WriteString(" " + strings.Join(words, ", ") + " |")
		}
		b.WriteString("\n")
	}
	if notes.Len() > 0 {
		b.WriteString("\nRefused:\n\n" + notes.String())
	}
	return b.String()
}

// versions are the first lines of what the programs say of themselves.
func versions(t *testing.T) string {
	t.Helper()
	var all []string
	for _, l := range libraries() {
		out, err := exec.Command(l.version[0], l.version[1:]...).Output()
		must(t, err)
		first, _, _ := strings.Cut(string(out), "\n")
		words := strings.Fields(first)
		version := words[len(words)-1]
		for _, w := range words {
			if strings.Count(w, ".") >= 2 {
				version = strings.TrimPrefix(w, "v")
				break
			}
		}
		all = append(all, l.name+" "+version)
	}
	return strings.Join(all, ", ")
}
