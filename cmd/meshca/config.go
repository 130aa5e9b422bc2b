package main

import (
	"net/url"
	"strconv"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/bundle"
	"github.com/meshca/meshca/cmd/internal/conf"
	"github.com/meshca/meshca/identity"
)

// config is the CA's configuration file. It says what the CA does; where its
// files and sockets are is said by flags.
type config struct {
	TrustDomain          string           `yaml:"trust_domain" doc:"The trust domain whose certificates this CA issues. It is fixed when the root is made; another value is refused."`
	Leaf                 leafConfig       `yaml:"leaf" doc:"Certificates of workloads."`
	IntermediateLifetime time.Duration    `yaml:"intermediate_lifetime" doc:"How long the CA's own intermediate is good; a new one is made at half of it. Must be at least twice leaf.ceiling, so that a leaf of any lifetime fits at any time."`
	Upstream             upstreamConfig   `yaml:"upstream" doc:"Whose the root is. Without it meshca makes one itself: with meshca init, or in the cluster. See docs/upstreams.md."`
	TokenIssuers         []issuerConfig   `yaml:"token_issuers" doc:"Whose tokens prove an identity. At least one, or kubernetes."`
	BundleEndpoint       bundleConfig     `yaml:"bundle_endpoint" doc:"Where other trust domains fetch ours (SPIFFE federation, profile https_web), at --bundle-listen."`
	Kubernetes           kubernetesConfig `yaml:"kubernetes" doc:"The cluster that the CA runs in and is for. The API server is then its store: root, policies, and what is known of pods are there, and its tokens prove identities. \"kubernetes: {}\" takes all defaults."`
	RenewByCertificate   []string         `yaml:"renew_by_certificate" doc:"SPIFFE IDs that may renew with their current certificate alone, without a token: machines outside Kubernetes. Whoever steals such a certificate can keep it alive, so the list is empty by default."`
	RootNamespace        string           `yaml:"root_namespace" doc:"The namespace whose PeerAuthentications without a selector are for the whole mesh. For policies that were written for Istio: istio-system."`
	ServerNames          []string         `yaml:"server_names" doc:"Further DNS names and IP addresses for the CA's own TLS certificate. The addresses of --listen, localhost, meshca.meshca-system.svc and istiod.istio-system.svc are always in it."`
}

type leafConfig struct {
	Lifetime time.Duration `yaml:"lifetime" doc:"How long a certificate is good when the client does not ask for less or more."`
	Floor    time.Duration `yaml:"floor" doc:"The shortest lifetime that is issued. Not below 5m, or 10s with --test-lifetimes."`
	Ceiling  time.Duration `yaml:"ceiling" doc:"The longest lifetime that is issued, to whoever asks for as much. Not above 24h. A stolen token is worth a certificate of this length."`
}

type bundleConfig struct {
	CertFile    string        `yaml:"cert_file" doc:"The certificate with its chain, PEM, by which clients verify the endpoint as a web server. Read again when it changes."`
	KeyFile     string        `yaml:"key_file" doc:"Its private key, PEM."`
	RefreshHint time.Duration `yaml:"refresh_hint" doc:"How often clients are asked to look again."`
}

type issuerConfig struct {
	Issuer         string                   `yaml:"issuer" doc:"The exact value of the tokens' iss claim."`
	Audiences      map[string]time.Duration `yaml:"audiences" doc:"Accepted audiences, each with the longest lifetime that its tokens may have. Default: {meshca: 1h}. For Istio's own agents add istio-ca: 24h."`
	WithoutPod     bool                     `yaml:"without_pod" doc:"Accept tokens that are bound to no pod. Such a token works until it expires, wherever it is copied to; for machines outside Kubernetes only."`
	JWKSFile       string                   `yaml:"jwks_file" doc:"The issuer's public keys as a JWK Set in a file, re-read when its content changes. Exactly one of jwks_file, jwks_url and kubernetes must be given."`
	JWKSURL        string                   `yaml:"jwks_url" doc:"The same at an https URL."`
	JWKSCAFile     string                   `yaml:"jwks_ca_file" doc:"The only authorities believed for jwks_url, as PEM. Required with it."`
	Kubernetes     bool                     `yaml:"kubernetes" doc:"Take the keys from a Kubernetes API server, with the three settings below."`
	APIServer      string                   `yaml:"api_server" doc:"The API server's URL. Default: https://kubernetes.default.svc."`
	APIServerCA    string                   `yaml:"api_server_ca_file" doc:"The API server's authorities. Default: the file that every pod is given."`
	APIServerToken string                   `yaml:"api_server_token_file" doc:"The CA's own token, read again for each request. Default: the file that every pod is given."`
}

// Where a pod finds what it needs to speak to its API server.
const (
	podAPIServer = "https://kubernetes.default.svc"
	podCA        = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
	podToken     = "/var/run/secrets/kubernetes.io/serviceaccount/token"
)

func defaultConfig() config {
	return config{
		TrustDomain:          "cluster.local",
		Leaf:                 leafConfig{Lifetime: time.Hour, Floor: 5 * time.Minute, Ceiling: 24 * time.Hour},
		IntermediateLifetime: 72 * time.Hour,
		RootNamespace:        defaultRootNamespace,
		Kubernetes:           defaultKubernetesConfig(),
		Upstream:             upstreamConfig{Vault: defaultVaultConfig()},
		BundleEndpoint:       bundleConfig{RefreshHint: bundle.DefaultRefreshHint},
	}
}

// loadConfig reads the file and checks what only this program knows: how the
// keys go together. The parts check the values when they are built.
func loadConfig(path string, testLifetimes bool) (config, *conf.File, error) {
	c := defaultConfig()
	file, err := conf.Load(path, &c)
	if err != nil {
		return c, nil, err
	}
	if _, err := identity.ParseTrustDomain(c.TrustDomain); err != nil {
		return c, nil, file.Errorf("trust_domain", "%v", err)
	}
	if c.RootNamespace == "" {
		return c, nil, file.Errorf("root_namespace", "it is empty; leave it out for %q", defaultRootNamespace)
	}
	if len(c.TokenIssuers) == 0 && !file.Has("kubernetes") {
		return c, nil, file.Errorf("token_issuers", "none given, nor kubernetes; without either nobody could prove an identity")
	}
	if err := c.Upstream.check(file); err != nil {
		return c, nil, err
	}
	if err := c.Kubernetes.check(file); err != nil {
		return c, nil, err
	}
	if file.Has("kubernetes") && testLifetimes {
		return c, nil, file.Errorf("kubernetes", "--test-lifetimes is for tests and demos and is refused with a cluster; leave one of the two out")
	}
	for i := range c.TokenIssuers {
		if err := c.TokenIssuers[i].complete(file, "token_issuers["+strconv.Itoa(i)+"]", testLifetimes); err != nil {
			return c, nil, err
		}
	}
	for i, id := range c.RenewByCertificate {
		if _, err := identity.ParseID(id); err != nil {
			return c, nil, file.Errorf("renew_by_certificate["+strconv.Itoa(i)+"]", "%v", err)
		}
	}
	return c, file, nil
}

// complete checks one issuer and fills in its defaults.
func (c *issuerConfig) complete(file *conf.File, key string, testLifetimes bool) error {
	if c.Issuer == "" {
		return file.Errorf(key, `"issuer" is missing; give the exact iss of its tokens`)
	}
	if err := c.oneSource(file, key); err != nil {
		return err
	}
	if c.Kubernetes {
		if testLifetimes {
			return file.Errorf(key+".kubernetes", "--test-lifetimes is for tests and demos and is refused with a cluster; leave one of the two out")
		}
		setDefault(&c.APIServer, podAPIServer)
		setDefault(&c.APIServerCA, podCA)
		setDefault(&c.APIServerToken, podToken)
	}
	if c.JWKSURL != "" {
		if u, err := url.Parse(c.JWKSURL); err != nil || u.Scheme != "https" || u.Host == "" {
			return file.Errorf(key+".jwks_url", "%q is not an https URL", c.JWKSURL)
		}
		if c.JWKSCAFile == "" {
			return file.Errorf(key+".jwks_url", "it needs jwks_ca_file, the authorities to believe for it")
		}
	}
	if c.Audiences == nil {
		c.Audiences = map[string]time.Duration{"meshca": time.Hour}
	}
	return nil
}

// oneSource refuses an issuer with no source of keys, with several, or with
// settings that belong to a source it does not have.
func (c *issuerConfig) oneSource(file *conf.File, key string) error {
	sources := 0
	for _, given := range []bool{c.JWKSFile != "", c.JWKSURL != "", c.Kubernetes} {
		if given {
			sources++
		}
	}
	if sources != 1 {
		return file.Errorf(key, "give exactly one of jwks_file, jwks_url and kubernetes; found %d", sources)
	}
	if c.JWKSCAFile != "" && c.JWKSURL == "" {
		return file.Errorf(key+".jwks_ca_file", "it belongs to jwks_url, which is not given")
	}
	for _, s := range []struct{ name, value string }{
		{"api_server", c.APIServer}, {"api_server_ca_file", c.APIServerCA}, {"api_server_token_file", c.APIServerToken},
	} {
		if s.value != "" && !c.Kubernetes {
			return file.Errorf(key+"."+s.name, `it belongs to "kubernetes: true", which is not given`)
		}
	}
	return nil
}

// settings turns the section into package ca's settings.
func (c leafConfig) settings(testLifetimes bool) ca.LeafConfig {
	return ca.LeafConfig{Lifetime: c.Lifetime, Floor: c.Floor, Ceiling: c.Ceiling, TestLifetimes: testLifetimes}
}

func setDefault(s *string, value string) {
	if *s == "" {
		*s = value
	}
}
