package vault

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config says which issuer signs, and how to come to it.
type Config struct {
	// Addresses are the https URLs of Vault's servers. The first that is active is
	// asked; behind a load balancer there is one.
	Addresses []string
	// CAFile holds, in PEM, the only authorities that the servers' certificates may
	// chain to. The system's are not consulted. It is read again for each request.
	CAFile string
	// Namespace is Vault's namespace that holds the mounts, for editions that have any.
	Namespace string
	// Mount is the path of the PKI secrets engine, such as "pki".
	Mount string
	// Issuer is the name or ID of the issuer. "default" is refused: whoever sets a
	// mount's default would choose who signs.
	Issuer string
	// RootsFile holds, in PEM, the roots to believe: all of them, and no other. It is
	// read again every 30 s.
	RootsFile string
	// Auth is how the CA proves who it is: a [Kubernetes], an [AppRole] or a [TokenFile].
	Auth Auth

	Now     func() time.Time      // the clock; time.Now if nil
	Log     *slog.Logger          // nil means no log
	Metrics prometheus.Registerer // if any, gets the upstream's metrics
}

// Paths and names go into URLs and into Vault's policies, whose globs and templates
// are made of other characters than these.
var (
	nameForm  = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$`)
	mountForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]*(/[A-Za-z0-9][A-Za-z0-9_-]*)*$`)
)

// Check returns what is wrong with the configuration, but for what the files hold.
func (c Config) Check() error {
	if len(c.Addresses) == 0 {
		return errors.New("no address is given")
	}
	for _, a := range c.Addresses {
		if err := checkAddress(a); err != nil {
			return err
		}
	}
	switch {
	case c.CAFile == "":
		return errors.New("no CA file is given; the system's authorities are not consulted")
	case c.RootsFile == "":
		return errors.New("no file of roots is given; which root to believe is not for Vault to say")
	case c.Namespace != "" && !mountForm.MatchString(c.Namespace):
		return fmt.Errorf("namespace %q: want names of letters, digits, _ and -, with / between", c.Namespace)
	case !mountForm.MatchString(c.Mount):
		return fmt.Errorf("mount %q: want names of letters, digits, _ and -, with / between", c.Mount)
	case strings.EqualFold(c.Issuer, "default"):
		return errors.New(`issuer "default" is whichever the mount's default is at the time; give the issuer's name or ID`)
	case !nameForm.MatchString(c.Issuer):
		return fmt.Errorf("issuer %q: want a name or ID of letters, digits, _, . and -", c.Issuer)
	case c.Auth == nil:
		return errors.New("no way to log in is given")
	}
	return c.Auth.check()
}

func checkAddress(address string) error {
	u, err := url.Parse(address)
	switch {
	case err != nil:
		return fmt.Errorf("address: %w", err)
	case u.Scheme != "https" || u.Host == "":
		return fmt.Errorf("address %q: want https://HOST:PORT", address)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "":
		// Not quoted: it may hold a password.
		return fmt.Errorf("address of host %q: want https://HOST:PORT and no more", u.Host)
	}
	return nil
}

// Auth is how the CA logs in. The kinds are [Kubernetes], [AppRole] and [TokenFile].
type Auth interface {
	check() error
	// start returns the method with what it keeps between logins.
	start() method
}

// Kubernetes logs in with a ServiceAccount's token, which Vault has reviewed by the
// cluster's API server.
type Kubernetes struct {
	Mount string // of the auth method, such as "kubernetes"
	Role  string
	// TokenFile is a projected token with an audience of Vault's own: one for
	// another audience would let Vault act as the CA there. It is read for each login.
	TokenFile string
}

// AppRole logs in with a RoleID and a SecretID.
type AppRole struct {
	Mount  string // of the auth method, such as "approle"
	RoleID string
	// SecretIDFile holds the SecretID. It is read for each login.
	SecretIDFile string
	// Wrapped says that the file holds a response-wrapping token. It is used once, and
	// the SecretID kept in memory; so a restart needs a new one.
	Wrapped bool
}

// TokenFile is the path of a file that holds a token, which something else may
// replace at any time.
type TokenFile string

func (k Kubernetes) check() error {
	switch {
	case !mountForm.MatchString(k.Mount):
		return fmt.Errorf("mount %q of Kubernetes auth: want names of letters, digits, _ and -, with / between", k.Mount)
	case !nameForm.MatchString(k.Role):
		return fmt.Errorf("role %q of Kubernetes auth: want a name of letters, digits, _, . and -", k.Role)
	case k.TokenFile == "":
		return errors.New("no token file is given for Kubernetes auth")
	}
	return nil
}

func (a AppRole) check() error {
	switch {
	case !mountForm.MatchString(a.Mount):
		return fmt.Errorf("mount %q of AppRole: want names of letters, digits, _ and -, with / between", a.Mount)
	case a.RoleID == "":
		return errors.New("no RoleID is given for AppRole")
	case a.SecretIDFile == "":
		return errors.New("no file of a SecretID is given for AppRole")
	}
	return nil
}

func (f TokenFile) check() error {
	if f == "" {
		return errors.New("no token file is given")
	}
	return nil
}
