package vault

import (
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/vault"
	"github.com/meshca/meshca/test/vaulttest"
)

const signPath = "pki/issuer/meshca/sign-intermediate"

// setPolicy writes the policy of the CA's tokens, which holds at once.
func (w *world) setPolicy(t *testing.T, text string) {
	t.Helper()
	_, err := w.Call(t.Context(), http.MethodPut, "sys/policies/acl/meshca", map[string]any{"policy": text})
	must(t, err)
}

// token makes a token of the policy and no other.
func (w *world) token(t *testing.T) string {
	t.Helper()
	answer, err := w.Call(t.Context(), http.MethodPut, "auth/token/create", map[string]any{"policies": []string{"meshca"}, "no_default_policy": true, "ttl": "1h"})
	must(t, err)
	s, _ := answer["client_token"].(string)
	return s
}

// body is what the CA sends for a signature.
func (w *world) body(t *testing.T) map[string]any {
	t.Helper()
	req := w.request(t)
	return map[string]any{
		"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: req.CSR.Raw})), "format": "pem",
		"use_csr_values": "false", "common_name": req.CSR.Subject.CommonName, "organization": "cluster.local",
		"serial_number": req.CSR.Subject.SerialNumber, "exclude_cn_from_sans": "true", "uri_sans": "spiffe://cluster.local",
		"max_path_length": "0", "key_usage": "CertSign,CRLSign", "ttl": vault.TTL(lifetime), "not_before_duration": "2m",
		"enforce_leaf_not_after_behavior": "false",
	}
}

// status is what a request with a token comes to: 0 for success.
func (w *world) status(t *testing.T, token, method, path string, body map[string]any) int {
	t.Helper()
	_, err := w.CallAs(t.Context(), token, method, path, body)
	if e := new(vaulttest.StatusError); errors.As(err, &e) {
		return e.Code
	}
	must(t, err)
	return 0
}

// forbidden wants a 403.
func (w *world) forbidden(t *testing.T, what, token, method, path string, body map[string]any) {
	t.Helper()
	if code := w.status(t, token, method, path, body); code != http.StatusForbidden {
		t.Errorf("%s: %s %s: status %d, want 403", what, method, path, code)
	}
}

var (
	pathBlock = regexp.MustCompile(`(?ms)^path "([^"]+)" \{\n.*?^\}\n`)
	parameter = regexp.MustCompile(`(?m)^    "([a-z_]+)" += \[.*\]\n`)
	required  = regexp.MustCompile(`(?m)^  required_parameters = \[(.*)\]\n`)
)

// Nothing in the policy can be left out, and it allows nothing else.
func TestV51_V42_PolicyAllowsExactlyWhatIsUsed(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	policy := string(w.script(t, nil, "show-policy"))
	u, _ := start(t, w.config())
	state(t, u, 10*time.Second, vault.OK)
	ours := w.token(t)

	// uses are what the CA does, each with a token of its own.
	uses := map[string]func(token string) int{
		signPath:                 func(token string) int { return w.status(t, token, http.MethodPut, signPath, w.body(t)) },
		"auth/token/lookup-self": func(token string) int { return w.status(t, token, http.MethodGet, "auth/token/lookup-self", nil) },
		"auth/token/renew-self": func(token string) int {
			return w.status(t, token, http.MethodPut, "auth/token/renew-self", map[string]any{})
		},
		"auth/token/revoke-self": func(token string) int { return w.status(t, token, http.MethodPut, "auth/token/revoke-self", nil) },
	}
	t.Run("whole", func(t *testing.T) {
		w.signs(t, u)
		for path, use := range uses {
			if code := use(w.token(t)); code != 0 {
				t.Errorf("%s: status %d", path, code)
			}
		}
	})
	t.Run("without a path", func(t *testing.T) {
		blocks := pathBlock.FindAllStringSubmatch(policy, -1)
		if len(blocks) != len(uses) || len(strings.Join(texts(blocks), "")) != len(policy) {
			t.Fatalf("%d paths in %q, and %d are used", len(blocks), policy, len(uses))
		}
		for _, block := range blocks {
			w.setPolicy(t, strings.Replace(policy, block[0], "", 1))
			for path, use := range uses {
				want := 0
				if path == block[1] {
					want = http.StatusForbidden
				}
				if code := use(w.token(t)); code != want {
					t.Errorf("without %s: %s: status %d, want %d", block[1], path, code, want)
				}
			}
		}
	})
	t.Run("without a parameter", func(t *testing.T) {
		allowed, _, _ := strings.Cut(policy, "denied_parameters")
		lines := parameter.FindAllStringSubmatch(allowed, -1)
		if len(lines) != len(w.body(t)) {
			t.Fatalf("%d parameters are allowed and %d sent", len(lines), len(w.body(t)))
		}
		for _, line := range lines {
			w.setPolicy(t, strings.Replace(policy, line[0], "", 1))
			_, err := u.SignIntermediate(t.Context(), w.request(t))
			if e := new(vault.Error); !errors.As(err, &e) || e.Status != http.StatusForbidden || e.Path != signPath {
				t.Errorf("without %s: %v", line[1], err)
			}
			w.setPolicy(t, policy)
			w.signs(t, u)
		}
	})
	t.Run("not required", func(t *testing.T) {
		list := required.FindStringSubmatch(policy)
		names := strings.Split(list[1], ", ")
		if len(names) != len(w.body(t)) {
			t.Fatalf("%d parameters are required and %d sent", len(names), len(w.body(t)))
		}
		for i, quoted := range names {
			name := strings.Trim(quoted, `"`)
			body := w.body(t)
			delete(body, name)
			w.setPolicy(t, policy)
			w.forbidden(t, "lacking "+name, ours, http.MethodPut, signPath, body)
			rest := append(append([]string{}, names[:i]...), names[i+1:]...)
			w.setPolicy(t, strings.Replace(policy, list[0], fmt.Sprintf("  required_parameters = [%s]\n", strings.Join(rest, ", ")), 1))
			// What Vault makes of it is its own: the fence is gone.
			if code := w.status(t, ours, http.MethodPut, signPath, body); code == http.StatusForbidden {
				t.Errorf("%s need not be listed as required", name)
			}
		}
		w.setPolicy(t, policy)
	})
	t.Run("not denied", func(t *testing.T) {
		_, denied, _ := strings.Cut(policy, "denied_parameters")
		lines := parameter.FindAllStringSubmatch(denied, -1)
		if len(lines) != len(w.body(t))-2 { // Vault itself wants a CSR, and any serial number will do
			t.Fatalf("%d parameters are denied", len(lines))
		}
		for _, line := range lines {
			body := w.body(t)
			body[line[1]] = ""
			w.setPolicy(t, policy)
			w.forbidden(t, "empty "+line[1], ours, http.MethodPut, signPath, body)
			w.setPolicy(t, strings.Replace(policy, line[0], "", 1))
			if code := w.status(t, ours, http.MethodPut, signPath, body); code == http.StatusForbidden {
				t.Errorf("an empty %s need not be denied", line[1])
			}
		}
		w.setPolicy(t, policy)
	})
	t.Run("other values", func(t *testing.T) {
		for name, values := range map[string][]string{
			"uri_sans":                        {"spiffe://other.test", "spiffe://cluster.local,spiffe://other.test", "spiffe://cluster.local/ns/a/sa/b", ""},
			"ttl":                             {"73h", "87600h", "", "259200"},
			"max_path_length":                 {"1", "-1", ""},
			"use_csr_values":                  {"true", "1"},
			"organization":                    {"other.test"},
			"common_name":                     {"meshca root"},
			"exclude_cn_from_sans":            {"false"},
			"key_usage":                       {"CertSign,CRLSign,DigitalSignature", ""},
			"not_before_duration":             {"24h"},
			"enforce_leaf_not_after_behavior": {"true"},
			"format":                          {"pem_bundle"},
			"alt_names":                       {"example.test"},
			"ip_sans":                         {"127.0.0.1"},
			"other_sans":                      {"1.3.6.1.4.1.311.20.2.3;utf8:x"},
			"permitted_dns_domains":           {"example.test"},
			"not_after":                       {"9999-12-31T23:59:59Z"},
			"not_before":                      {"2000-01-01T00:00:00Z"},
			"ext_key_usage":                   {"ServerAuth"},
			"skid":                            {"00"},
			"use_pss":                         {"true"},
		} {
			for _, value := range values {
				body := w.body(t)
				body[name] = value
				w.forbidden(t, name+"="+value, ours, http.MethodPut, signPath, body)
			}
		}
		body := maps.Clone(w.body(t))
		body["use_csr_values"] = true // of another type
		w.forbidden(t, "use_csr_values", ours, http.MethodPut, signPath, body)
	})
	t.Run("other paths", func(t *testing.T) {
		_, err := w.Call(t.Context(), http.MethodPut, "pki/root/generate/internal", map[string]any{"common_name": "other", "issuer_name": "other", "ttl": "1000h"})
		must(t, err)
		_, err = w.Call(t.Context(), http.MethodPut, "pki/roles/any", map[string]any{"allow_any_name": true})
		must(t, err)
		for _, path := range []string{
			"pki/issuer/other/sign-intermediate", "pki/issuer/default/sign-intermediate", "pki/root/sign-intermediate",
			"pki/issuer/meshca/sign-verbatim", "pki/issuer/meshca/sign-self-issued", "pki/issuer/meshca/sign/any", "pki/issuer/meshca/issue/any",
			"pki/sign/any", "pki/issue/any", "pki/sign-verbatim", "pki/root/generate/internal", "pki/root/generate/exported", "pki/root/replace",
			"pki/issuer/meshca", "pki/issuer/meshca/revoke", "pki/config/issuers", "pki/roles/any", "pki/revoke",
			"sys/policies/acl/meshca", "auth/token/create", "auth/token/create-orphan", "auth/token/revoke", "auth/approle/role/meshca/secret-id",
			"sys/seal", "sys/mounts/pki",
		} {
			w.forbidden(t, "other path", ours, http.MethodPut, path, w.body(t))
		}
		w.forbidden(t, "deleting", ours, http.MethodDelete, "pki/issuer/meshca", nil)
		w.forbidden(t, "reading", ours, http.MethodGet, "sys/policies/acl/meshca", nil)
		w.forbidden(t, "reading", ours, http.MethodGet, "pki/roles/any", nil)
		w.forbidden(t, "listing", ours, "LIST", "pki/roles", nil)
	})
	w.signs(t, u)
}

func texts(matches [][]string) (all []string) {
	for _, m := range matches {
		all = append(all, m[0])
	}
	return all
}
