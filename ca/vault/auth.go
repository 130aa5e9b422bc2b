package vault

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/meshca/meshca/identity/inputfile"
)

const maxSecretFile = 16 << 10

// method is an [Auth] at work.
type method interface {
	// login gets a token. It is called by one goroutine at a time.
	login(ctx context.Context, u *Upstream, address string) (*session, error)
	// changed reports whether there is another credential than at the last login, so
	// that what came of that says nothing about the next.
	changed() bool
	// limits are what operators should know of the next login.
	limits() limits
}

// limits say how far the credential of a method goes, where it is known.
type limits struct {
	end  time.Time // when it ends; zero if not known
	uses int       // how many logins it is still good for; -1 if not known or without limit
	note string    // what a restart needs; empty if nothing
}

func (k Kubernetes) start() method { return &kubernetes{k, credential{path: k.TokenFile}} }
func (a AppRole) start() method {
	return &appRole{AppRole: a, credential: credential{path: a.SecretIDFile}}
}
func (f TokenFile) start() method { return &tokenFile{credential{path: string(f)}} }

// credential is what lies in a file, and a fingerprint of what was last used of it.
type credential struct {
	path string
	used [sha256.Size]byte
}

func (c *credential) changed() bool {
	content, err := readSecret(c.path)
	return err == nil && sha256.Sum256([]byte(content)) != c.used
}

// take reads the file.
func (c *credential) take() (string, error) {
	content, err := readSecret(c.path)
	if err == nil {
		c.used = sha256.Sum256([]byte(content))
	}
	return content, err
}

type kubernetes struct {
	Kubernetes
	credential
}

func (k *kubernetes) limits() limits { return limits{uses: -1} }

func (k *kubernetes) login(ctx context.Context, u *Upstream, address string) (*session, error) {
	const doing = "logging in as a ServiceAccount"
	path := "auth/" + k.Mount + "/login"
	jwt, err := k.take()
	if err != nil {
		return nil, &Error{State: Expired, Doing: doing, Address: address, Path: path, Reason: err.Error(), Hint: "mount a projected token there"}
	}
	s, err := u.login(ctx, address, request{
		doing: doing, path: path, secrets: []string{jwt},
		body: map[string]any{"role": k.Role, "jwt": jwt},
	})
	if err := asError(err); err != nil {
		switch err.State {
		case Forbidden, Refused:
			err.State = Forbidden
			err.Hint = fmt.Sprintf("role %q of auth/%s must name this CA's ServiceAccount, its namespace and the token's audience, and Vault must be allowed to review tokens", k.Role, k.Mount)
		}
		return nil, err
	}
	return s, nil
}

type appRole struct {
	AppRole
	credential
	secretID string            // unwrapped; empty before, and once Vault has refused it
	wrapper  [sha256.Size]byte // the wrapping token that it came in
	known    limits            // of secretID
	refused  [sha256.Size]byte // the SecretID that Vault refused
}

func (a *appRole) limits() limits {
	l := limits{uses: -1}
	if a.Wrapped && a.secretID != "" {
		l = a.known
		l.note = fmt.Sprintf("the wrapped SecretID in %q has been used: a restart needs a new one", a.SecretIDFile)
	}
	return l
}

func (a *appRole) login(ctx context.Context, u *Upstream, address string) (*session, error) {
	const doing = "logging in by AppRole"
	path := "auth/" + a.Mount + "/login"
	refuse := func(reason, hint string) *Error {
		return &Error{State: Expired, Doing: doing, Address: address, Path: path, Reason: reason, Hint: hint}
	}
	id, err := a.current(ctx, u, address)
	if err != nil {
		if e := new(Error); errors.As(err, &e) {
			return nil, e
		}
		return nil, refuse(err.Error(), "deliver a new SecretID there")
	}
	hint := fmt.Sprintf("deliver a new SecretID in %q; each start of the CA uses one of its uses", a.SecretIDFile)
	hash := sha256.Sum256([]byte(id))
	if hash == a.refused {
		return nil, refuse("the SecretID is the one that Vault refused", hint)
	}
	s, err := u.login(ctx, address, request{
		doing: doing, path: path, secrets: []string{id, a.RoleID},
		body: map[string]any{"role_id": a.RoleID, "secret_id": id},
	})
	if e := asError(err); e != nil {
		if e.Status == http.StatusBadRequest || e.Status == http.StatusForbidden {
			// It is expired, used up, destroyed or for another role, and will not get
			// better by being shown again.
			e.State, e.Hint, a.refused, a.secretID = Expired, hint, hash, ""
		}
		return nil, e
	}
	if a.known.uses > 0 {
		a.known.uses--
	}
	return s, nil
}

// current is the SecretID to use, unwrapped if it comes so.
func (a *appRole) current(ctx context.Context, u *Upstream, address string) (string, error) {
	if a.secretID != "" {
		return a.secretID, nil
	}
	content, err := a.take()
	if err != nil || !a.Wrapped {
		return content, err
	}
	hash := sha256.Sum256([]byte(content))
	if hash == a.wrapper {
		return "", fmt.Errorf("the wrapping token in %q has been used, and its SecretID is no longer good", a.SecretIDFile)
	}
	id, known, err := a.unwrap(ctx, u, address, content)
	if err != nil {
		return "", err
	}
	a.wrapper, a.secretID, a.known = hash, id, known
	return id, nil
}

// unwrap takes the SecretID out of its wrapping, which works once: if somebody else
// has done it, this fails. So does a token that wraps something else, which is what
// whoever did it would leave.
func (a *appRole) unwrap(ctx context.Context, u *Upstream, address, wrapping string) (string, limits, error) {
	const doing = "unwrapping the SecretID"
	secrets := []string{wrapping}
	tampered := func(path, reason string) error {
		u.log.Error("a wrapped SecretID does not unwrap: somebody else may have it", "file", a.SecretIDFile, "reason", reason)
		return &Error{State: Expired, Doing: doing, Address: address, Path: path, Reason: reason,
			Hint: fmt.Sprintf("unless a restart of this CA used it, somebody else has: destroy that SecretID and deliver a new one in %q", a.SecretIDFile)}
	}
	made, err := u.send(ctx, address, request{
		doing: doing, method: http.MethodPut, path: "sys/wrapping/lookup", secrets: secrets, timeout: callTimeout,
		body: map[string]any{"token": wrapping},
	})
	if e := asError(err); e != nil {
		if e.Status == http.StatusBadRequest || e.Status == http.StatusForbidden {
			return "", limits{}, tampered(e.Path, e.Reason)
		}
		return "", limits{}, e
	}
	from := text(made, "creation_path")
	if !strings.HasPrefix(from, "auth/"+a.Mount+"/role/") || !strings.HasSuffix(from, "/secret-id") {
		return "", limits{}, tampered("sys/wrapping/lookup", fmt.Sprintf("it wraps an answer of %.100q, not a SecretID of auth/%s", from, a.Mount))
	}
	s, err := u.send(ctx, address, request{
		doing: doing, method: http.MethodPut, path: "sys/wrapping/unwrap", token: wrapping, timeout: callTimeout,
	})
	if e := asError(err); e != nil {
		if e.Status == http.StatusBadRequest || e.Status == http.StatusForbidden {
			return "", limits{}, tampered(e.Path, e.Reason)
		}
		return "", limits{}, e
	}
	id := text(s, "secret_id")
	if id == "" {
		return "", limits{}, tampered("sys/wrapping/unwrap", "there is no SecretID in it")
	}
	l := limits{uses: -1}
	if ttl := number(s, "secret_id_ttl"); ttl > 0 {
		l.end = u.now().Add(time.Duration(ttl) * time.Second)
	}
	if uses := number(s, "secret_id_num_uses"); uses > 0 {
		l.uses = int(uses)
	}
	return id, l, nil
}

type tokenFile struct{ credential }

func (f *tokenFile) limits() limits { return limits{uses: -1} }

// login reads the file and looks its token up.
func (f *tokenFile) login(ctx context.Context, u *Upstream, address string) (*session, error) {
	token, err := f.take()
	if err != nil {
		return nil, &Error{State: Expired, Doing: "reading the token", Address: address, Path: "auth/token/lookup-self", Reason: err.Error(), Hint: "put a token there"}
	}
	s, err := u.lookup(ctx, address, token)
	if e := asError(err); e != nil {
		if e.Status == http.StatusForbidden {
			e.State, e.Hint = Expired, fmt.Sprintf("the token in %q has ended, was revoked, or may not look itself up: put a new one there", f.path)
		}
		return nil, e
	}
	s.ofFile = true
	return s, nil
}

// asError is err as an *Error, nil if it is nil. Whatever asks Vault returns no other
// kind.
func asError(err error) *Error {
	if err == nil {
		return nil
	}
	if e := new(Error); errors.As(err, &e) {
		return e
	}
	return &Error{State: Refused, Reason: err.Error()}
}

// text and number are fields of an answer, empty and zero if they are not there.
func text(s *api.Secret, key string) string {
	if s == nil {
		return ""
	}
	v, _ := s.Data[key].(string)
	return v
}

func number(s *api.Secret, key string) int64 {
	if s == nil {
		return 0
	}
	n, _ := s.Data[key].(json.Number)
	i, err := n.Int64()
	if err != nil {
		return 0
	}
	return i
}

// readSecret reads a token, or what is like one, from a file.
func readSecret(path string) (string, error) {
	b, err := inputfile.Read(path, maxSecretFile)
	if err != nil {
		return "", err
	}
	secret := strings.TrimSpace(string(b))
	if secret == "" {
		return "", fmt.Errorf("file %q is empty", path)
	}
	for i := range len(secret) {
		if secret[i] <= ' ' || secret[i] > '~' {
			return "", fmt.Errorf("file %q holds more than one token, or none", path)
		}
	}
	return secret, nil
}
