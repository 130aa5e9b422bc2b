package lint

import (
	"crypto/x509"
	"fmt"
	"slices"

	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	zlintlint "github.com/zmap/zlint/v3/lint"
)

// notOurs are the sources of rules for certificates that web browsers trust out
// of the box, with the reason why none of them is applied. Every other source
// that zlint has is.
func notOurs() map[zlintlint.LintSource]string {
	return map[zlintlint.LintSource]string{
		zlintlint.CABFBaselineRequirements:      "public web: wants policies, revocation addresses and public names, and forbids URIs, which SPIFFE needs",
		zlintlint.CABFCSBaselineRequirements:    "public code signing",
		zlintlint.CABFEVGuidelines:              "public web, extended validation",
		zlintlint.CABFSMIMEBaselineRequirements: "public e-mail",
		zlintlint.MozillaRootStorePolicy:        "Mozilla's root programme",
		zlintlint.AppleRootStorePolicy:          "Apple's root programme: certificate transparency",
		zlintlint.ChromeRootStorePolicy:         "Chrome's root programme",
		zlintlint.EtsiEsi:                       "European qualified certificates",
	}
}

// except are single rules of the other sources that do not hold, with the
// reason.
func except() map[string]string {
	return map[string]string{
		"n_san_iana_pub_suffix_empty": "it says that \"localhost\" is no public name; the serving certificate has it for development machines",
	}
}

// Certificate returns what zlint finds wrong, notices and warnings included,
// one line for each finding, sorted.
func Certificate(c *x509.Certificate) ([]string, error) {
	parsed, err := zx509.ParseCertificate(c.Raw)
	if err != nil {
		return nil, fmt.Errorf("linting certificate %x: zcrypto cannot parse it: %w", c.SerialNumber, err)
	}
	var sources zlintlint.SourceList
	for s := range notOurs() {
		sources = append(sources, s)
	}
	registry, err := zlintlint.GlobalRegistry().Filter(zlintlint.FilterOptions{ExcludeSources: sources})
	if err != nil {
		return nil, fmt.Errorf("choosing lints: %w", err)
	}
	findings := []string{}
	for name, result := range zlint.LintCertificateEx(parsed, registry).Results {
		if _, known := except()[name]; known || result.Status < zlintlint.Notice {
			continue
		}
		findings = append(findings, fmt.Sprintf("%s: %s: %s", result.Status, name, result.Details))
	}
	slices.Sort(findings)
	return findings, nil
}
