package vault

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
)

// issuerFacts are what was last seen of the issuer and of the mount's default.
type issuerFacts struct {
	id, name, err string
	end           time.Time // of the issuer's own certificate
	believed      bool      // it leads to one of the roots
	other         string    // the mount's default, if that is another issuer
}

// look reads the issuer and the mount's default, which needs no token: none is shown.
// What it finds is reported and nothing else; a default is never followed.
// The error says why there was no answer about ours.
func (u *Upstream) look(ctx context.Context) *Error {
	old := u.issuer
	facts := issuerFacts{}
	mine, err := u.send(ctx, u.active(), u.readIssuer(u.config.Issuer))
	switch {
	case err != nil:
		facts = old
		facts.err = err.Error()
	case mine == nil:
		facts.err = fmt.Sprintf("there is no issuer %q at %q", u.config.Issuer, u.config.Mount)
	default:
		facts.id, facts.name = text(mine, "issuer_id"), text(mine, "issuer_name")
		if certs, err := parse(text(mine, "certificate")); err == nil && len(certs) == 1 {
			facts.end = certs[0].NotAfter
			var others []*x509.Certificate
			list, _ := mine.Data["ca_chain"].([]any)
			for _, v := range list[:min(len(list), maxCertificates)] {
				s, _ := v.(string)
				if c, err := parse(s); err == nil {
					others = append(others, c...)
				}
			}
			b := pathBuilder{others: others, roots: u.roots.certs}
			facts.believed = b.from(certs) != nil
		}
	}
	if def, e := u.send(ctx, u.active(), u.readIssuer("default")); e == nil && facts.id != "" {
		if id := text(def, "issuer_id"); id != "" && id != facts.id {
			facts.other = id
			if name := text(def, "issuer_name"); name != "" {
				facts.other = name + " (" + id + ")"
			}
		}
	}
	if facts.other != old.other && facts.other != "" {
		u.log.Warn("the default issuer of Vault's mount is another than ours; it is not used", "default", facts.other)
	}
	if facts.err != old.err && facts.err != "" {
		u.log.Warn("the issuer cannot be looked at", "error", facts.err)
	}
	u.issuer = facts
	return asError(err)
}

func (u *Upstream) readIssuer(ref string) request {
	return request{doing: "looking at the issuer", method: http.MethodGet, path: u.config.Mount + "/issuer/" + ref + "/json", timeout: healthTimeout}
}

// Report says how Vault is, what will be done next, and what a restart of the CA would
// lose. It only reads and never waits.
func (u *Upstream) Report() ca.Report { return *u.report.Load() }

// publish makes the report and the metrics anew. The caller holds the turn.
func (u *Upstream) publish() {
	now := u.now()
	r := &ca.Report{Kind: "vault", State: string(OK)}
	limits := u.method.limits()
	loses := limits.note != ""
	if f := u.fault; f != nil {
		r.State = string(f.err.State)
		loses = true
		r.Detail = fmt.Sprintf("since %s: %v; a CA that is restarted now could not sign", stamp(f.since), f.err)
	}
	r.Away = loses
	r.Next, r.NextAt = u.plan()
	if limits.note != "" {
		r.Notes = append(r.Notes, limits.note)
	}
	if !limits.end.IsZero() {
		r.Notes = append(r.Notes, fmt.Sprintf("the SecretID ends at %s: deliver a new one before", stamp(limits.end)))
	}
	if limits.uses == 0 {
		r.Notes = append(r.Notes, "the SecretID is used up: the next login needs a new one")
	}
	if i := u.issuer; i.err != "" {
		r.Notes = append(r.Notes, "the issuer could not be looked at: "+i.err)
	} else if i.id != "" {
		if !i.believed {
			r.Notes = append(r.Notes, fmt.Sprintf("issuer %q leads to none of the roots in %q: what it signs next is refused", u.config.Issuer, u.config.RootsFile))
		}
		if life := time.Duration(u.lifeFor.Load()); life > 0 && i.end.Before(now.Add(life)) {
			r.Notes = append(r.Notes, fmt.Sprintf("issuer %q ends at %s: intermediates are cut to that; make a new issuer in Vault", u.config.Issuer, stamp(i.end)))
		}
	}
	if other := u.issuer.other; other != "" {
		r.Notes = append(r.Notes, fmt.Sprintf("the default issuer of mount %q is %s; it is not used: to move to it, add its root to %q and name it in the configuration", u.config.Mount, other, u.config.RootsFile))
	}
	u.report.Store(r)
	u.metrics.publish(r, u.session, limits, u.issuer, loses)
}

// plan is what will be done next by itself, and when.
func (u *Upstream) plan() (string, time.Time) {
	if f := u.fault; f != nil && !f.signing {
		if (f.err.State == Expired || f.err.State == Forbidden) && u.loginAt.After(u.lookAt) {
			return "log in", u.loginAt
		}
		return "look whether Vault is back", u.lookAt
	}
	s := u.session
	switch {
	case s == nil || s.actAt.IsZero():
		return "look how Vault is", u.lookAt
	case s.renewable && !s.last:
		return "renew the token", s.actAt
	case s.ofFile:
		return "read the token's file again", u.lookAt
	}
	return "log in anew", s.actAt
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

type metrics struct {
	state       *prometheus.GaugeVec
	logins      *prometheus.CounterVec
	renewals    *prometheus.CounterVec
	tokenEnd    prometheus.Gauge
	secretIDEnd prometheus.Gauge
	secretUses  prometheus.Gauge
	issuerEnd   prometheus.Gauge
	other       prometheus.Gauge
	loses       prometheus.Gauge
	next        prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: "meshca_vault_" + name, Help: help})
	}
	m := &metrics{
		state: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "meshca_vault_state",
			Help: "1 for the state that Vault is in, as far as this CA is concerned, 0 for the others.",
		}, []string{"state"}),
		logins: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_vault_logins_total",
			Help: "Logins at Vault, by result (ok, refused, failed).",
		}, []string{"result"}),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_vault_token_renewals_total",
			Help: "Renewals of the token for Vault, by result (ok, refused, failed).",
		}, []string{"result"}),
		tokenEnd:    gauge("token_end_timestamp_seconds", "When the token for Vault ends unless it is renewed, in Unix time; 0 if there is none or it does not end."),
		secretIDEnd: gauge("secret_id_end_timestamp_seconds", "When AppRole's SecretID ends, in Unix time; 0 if that is not known."),
		secretUses:  gauge("secret_id_uses_left", "How many logins AppRole's SecretID is still good for; -1 if that is not known or without limit."),
		issuerEnd:   gauge("issuer_end_timestamp_seconds", "When the certificate of Vault's issuer ends, in Unix time; 0 if it has not been seen."),
		other:       gauge("default_issuer_is_another", "1 if the mount's default issuer is not the configured one."),
		loses:       gauge("restart_loses_signing", "1 if a CA that is restarted now could not sign until somebody has done something."),
		next:        gauge("next_action_timestamp_seconds", "When the CA will act next by itself, such as renewing its token, in Unix time."),
	}
	for _, s := range States() {
		m.state.WithLabelValues(string(s))
	}
	for _, result := range []string{"ok", "refused", "failed"} {
		m.logins.WithLabelValues(result)
		m.renewals.WithLabelValues(result)
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.state, m.logins, m.renewals, m.tokenEnd, m.secretIDEnd, m.secretUses, m.issuerEnd, m.other, m.loses, m.next} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) publish(r *ca.Report, s *session, l limits, i issuerFacts, loses bool) {
	for _, state := range States() {
		m.state.WithLabelValues(string(state)).Set(truth(r.State == string(state)))
	}
	var end time.Time
	if s != nil {
		end = s.end
	}
	m.tokenEnd.Set(unix(end))
	m.secretIDEnd.Set(unix(l.end))
	m.secretUses.Set(float64(l.uses))
	m.issuerEnd.Set(unix(i.end))
	m.other.Set(truth(i.other != ""))
	m.loses.Set(truth(loses))
	m.next.Set(unix(r.NextAt))
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func unix(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.Unix())
}
