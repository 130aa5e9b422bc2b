package main

import (
	"crypto/x509"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca/files"
	"github.com/meshca/meshca/cmd/internal/conf"
	"github.com/meshca/meshca/identity"
)

// filesConfig says where the operator's own CA lies.
type filesConfig struct {
	Dir    string `yaml:"dir" doc:"The directory with the CA's certificate, its key, its chain and the roots, such as the mount of Istio's Secret cacerts or of one of type kubernetes.io/tls. It is watched; a set of files that cannot be used is refused whole, and the one before goes on."`
	Layout string `yaml:"layout" doc:"The names of the files: cacerts (ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem), tls (tls.crt, tls.key, ca.crt), or auto for the one of which there are files."`
}

// check checks what can be known before a file is read.
func (c filesConfig) check(file *conf.File) error {
	const key = "upstream.files"
	if c.Dir == "" {
		return file.Errorf(key, `"dir" is missing; give the directory that the CA's files are in`)
	}
	switch files.Layout(c.Layout) {
	case "", files.LayoutAuto, files.LayoutCACerts, files.LayoutTLS:
		return nil
	}
	return file.Errorf(key+".layout", "%q is unknown; there are %q, %q and %q", c.Layout, files.LayoutAuto, files.LayoutCACerts, files.LayoutTLS)
}

// openFiles reads the CA in the operator's files.
func openFiles(c filesConfig, td identity.TrustDomain, judge func(anchor *x509.Certificate, roots []*x509.Certificate) error, log *slog.Logger, metrics prometheus.Registerer) (*files.Upstream, error) {
	return files.New(files.Config{
		Dir: c.Dir, Layout: files.Layout(c.Layout), TrustDomain: td, Judge: judge,
		Now: time.Now, Log: log, Metrics: metrics,
	})
}
