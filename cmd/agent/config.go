package main

import (
	"net"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/cmd/internal/conf"
	"github.com/meshca/meshca/identity"
)

// config is the agent's configuration file, which may be left out. It says what
// the agent does; where its files and sockets are is said by flags.
type config struct {
	TrustDomain string   `yaml:"trust_domain" doc:"The trust domain that the identity must belong to. A certificate of another is refused."`
	KeyType     string   `yaml:"key_type" doc:"The kind of key to make for each certificate: P-256, P-384, Ed25519 or RSA-2048."`
	CA          caConfig `yaml:"ca" doc:"How to reach the CA."`
}

type caConfig struct {
	Addresses  []string `yaml:"addresses" doc:"The CA's addresses as host:port, tried in this order, the one that answered last first. May be given by --ca instead."`
	ServerName string   `yaml:"server_name" doc:"The name to look for in the CA's certificate, where it is not the address's host."`
}

func defaultConfig() config {
	return config{TrustDomain: "cluster.local", KeyType: string(agent.P256)}
}

// loadConfig reads the file, if there is one, and joins it with the addresses
// of the command line.
func loadConfig(path string, addresses []string) (config, error) {
	c := defaultConfig()
	var file *conf.File
	if path != "" {
		var err error
		if file, err = conf.Load(path, &c); err != nil {
			return c, &cli.UsageError{Err: err}
		}
	}
	if len(addresses) > 0 {
		if file.Has("ca.addresses") {
			return c, &cli.UsageError{Err: file.Errorf("ca.addresses", "the addresses are given by --ca too; leave one of the two out")}
		}
		c.CA.Addresses = addresses
	}
	if len(c.CA.Addresses) == 0 {
		return c, cli.Usagef("no address of a CA; give --ca host:port, or ca.addresses in the configuration file")
	}
	for _, a := range c.CA.Addresses {
		if host, port, err := net.SplitHostPort(a); err != nil || host == "" || port == "" {
			return c, &cli.UsageError{Err: file.Errorf("ca.addresses", "%q is not host:port", a)}
		}
	}
	if _, err := identity.ParseTrustDomain(c.TrustDomain); err != nil {
		return c, &cli.UsageError{Err: file.Errorf("trust_domain", "%v", err)}
	}
	if _, err := agent.ParseKeyType(c.KeyType); err != nil {
		return c, &cli.UsageError{Err: file.Errorf("key_type", "%v", err)}
	}
	return c, nil
}
