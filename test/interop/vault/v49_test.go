package vault

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/vault"
)

// spoken is everything that an upstream has told anybody.
func spoken(t *testing.T, w *world, u *vault.Upstream, errs ...error) string {
	t.Helper()
	all, err := w.metrics.Gather()
	must(t, err)
	return fmt.Sprintf("%s\n%+v\n%v\n%v", w.log, u.Report(), all, errs)
}

// A login, a renewal and failures of all kinds leave no token, SecretID, RoleID or wrapping
// token in logs, reports, metrics and errors.
func TestV49_SecretsAreNowhere(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	ctx := t.Context()
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.log)
		}
	})
	wrapping := func() string {
		out, err := w.Run(ctx, nil, "vault", "write", "-wrap-ttl=5m", "-field=wrapping_token", "-f", "auth/approle/role/meshca/secret-id")
		must(t, err)
		return strings.TrimSpace(string(out))
	}
	secretID := func() string {
		w.newSecretID(t)
		b, err := os.ReadFile(w.secret)
		must(t, err)
		return string(b)
	}
	secrets := []string{w.RootToken(), w.roleID}
	var errs []error
	sign := func(u *vault.Upstream) {
		_, err := u.SignIntermediate(ctx, w.request(t))
		if err == nil {
			t.Fatal("signed")
		}
		errs = append(errs, err)
	}

	// A token that this test knows, from a file: renewed, revoked, and no token at all.
	token := w.token(t)
	secrets = append(secrets, token, "hvs.CAESINoSuchTokenWasEverMade")
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, token)
	config := counting(w)
	config.Auth = vault.TokenFile(file)
	u, stop := start(t, config)
	state(t, u, 10*time.Second, vault.OK)
	w.signs(t, u)
	w.ahead.add(45 * time.Minute) // past the time of its renewal, and before its end
	within(t, 35*time.Second, "a renewal", func() error {
		if n := counted(t, w.metrics, "meshca_vault_token_renewals_total", "ok"); n == 0 {
			return fmt.Errorf("%v renewals", n)
		}
		return nil
	})
	w.setPolicy(t, "# nothing\n")
	sign(u)
	w.script(t, nil, "policy")
	_, err := w.Call(ctx, http.MethodPut, "auth/token/revoke", map[string]any{"token": token})
	must(t, err)
	sign(u)
	write(t, file, secrets[len(secrets)-1])
	sign(u)
	must(t, w.Seal(ctx))
	sign(u)
	must(t, w.Unseal(ctx))
	said := spoken(t, w, u, errs...)
	stop()

	// AppRole: a good SecretID, one that is destroyed, a wrapped one, and one used.
	good := secretID()
	destroyed := good[:len(good)-4] + "0000"
	wrapped := wrapping()
	secrets = append(secrets, good, destroyed, wrapped)
	for _, try := range []struct {
		content string
		wrapped bool
		want    vault.State
	}{
		{good, false, vault.OK}, {destroyed, false, vault.Expired},
		{wrapped, true, vault.OK}, {wrapped, true, vault.Expired}, {good, true, vault.Expired},
	} {
		write(t, w.secret, try.content)
		config, auth := w.config(), w.appRole()
		auth.Wrapped = try.wrapped
		config.Auth = auth
		u, stop := start(t, config)
		state(t, u, 10*time.Second, try.want)
		if try.want != vault.OK {
			sign(u)
		} else {
			w.signs(t, u)
		}
		said += spoken(t, w, u, errs...)
		stop()
	}
	must(t, w.Kill())
	u, stop = start(t, w.config())
	state(t, u, 10*time.Second, vault.Unreachable)
	sign(u)
	said += spoken(t, w, u, errs...)
	stop()

	// What was looked for must have been where it was looked for.
	said += w.log.String()
	holds(t, said, "was renewed", "sealed", "403", "SecretID", "meshca_vault_state", "logged in at Vault", "somebody else may have it")
	for i, s := range secrets {
		if len(s) < 10 || strings.Contains(said, s) {
			t.Errorf("secret %d (%.8s…) is in what was said, or is none", i, s)
		}
	}
	// Tokens that this test does not know have a form of their own.
	for _, form := range []string{"hvs.", "hvb.", "s.CAES"} {
		if i := strings.Index(said, form); i >= 0 {
			t.Errorf("a token in what was said: …%.60s", said[i:])
		}
	}
}
