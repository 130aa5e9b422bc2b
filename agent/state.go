package agent

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/meshca/meshca/agent/caclient"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/sds"
	"github.com/meshca/meshca/wire"
)

// state is everything that the agent knows. It is guarded by Agent.mu.
type state struct {
	svid *identity.SVID // nil until the first; afterwards only replaced
	term term           // of svid
	// bundle is what the workload believes. Until the CA's stream has brought
	// one it is the roots of the first CSR answer, which bear no sequence.
	bundle    *identity.Bundle
	streamed  bool             // bundle came over the stream
	policy    *policy.Resolved // the newest that a CA knew; nil before there was one
	refused   string           // why the last response was; empty if it was not
	denied    error
	connected bool

	failures int
	lastErr  error
	alarmed  bool
	obeyed   time.Time // the CA's last wish for a renewal that was obeyed

	first        chan struct{} // closed when the first SVID is there
	filesChanged chan struct{} // closed and replaced when token or anchor changed
}

// valid reports whether there is an SVID that peers accept at now.
func (s *state) valid(now time.Time) bool {
	return s.svid != nil && !now.Before(s.svid.Leaf().NotBefore) && now.Before(s.svid.NotAfter())
}

func (s *state) sequence() uint64 {
	if !s.streamed {
		return 0
	}
	return s.bundle.Sequence()
}

// publishLocked hands the state to the feed.
func (a *Agent) publishLocked() {
	a.conf.Feed.Publish(sds.State{SVID: a.state.svid, Bundle: a.state.bundle, Policy: a.state.policy, Denied: a.state.denied})
}

// ClockError says that a new certificate is not valid yet by our clock: it, or
// the CA's, is wrong.
type ClockError struct{ Begins, Now time.Time }

func (e *ClockError) Error() string {
	return fmt.Sprintf("the new certificate begins at %s, but the clock here says %s: it is at least %s behind the CA's; set one of them right",
		stamp(e.Begins), stamp(e.Now), approx(e.Begins.Sub(e.Now)))
}

// IDError says that the CA gave this agent another identity than it has.
type IDError struct{ Held, Got identity.ID }

func (e *IDError) Error() string {
	return fmt.Sprintf("it is about %s, but this agent is %s", e.Got, e.Held)
}

// checkID refuses what is about somebody else. The state is locked.
func (a *Agent) checkID(got identity.ID) error {
	held := a.conf.ID
	if a.state.svid != nil {
		held = a.state.svid.ID()
	}
	if !held.IsZero() && got != held {
		return &IDError{Held: held, Got: got}
	}
	return nil
}

// StaleError says that a CA sent an older bundle than the one in use.
type StaleError struct{ Held, Got uint64 }

func (e *StaleError) Error() string {
	return fmt.Sprintf("the bundle has sequence %d; sequence %d is in use already", e.Got, e.Held)
}

// ConflictError says that a CA sent another bundle than the one in use under the
// same sequence. Which of them is right cannot be told, and the one in use stays.
type ConflictError struct {
	Sequence  uint64
	Held, Got *identity.Bundle
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("the bundle has sequence %d, as the one in use, but other content: %s, not %s; whoever changes the authorities must raise the sequence",
		e.Sequence, describeKeys(e.Got.Authorities()), describeKeys(e.Held.Authorities()))
}

// take verifies a CA's answer to the request that key belongs to and, if all of
// it holds, makes it the identity in use. Otherwise the old one stays.
//
//  1. The chain is an X509-SVID for key.
//  2. It is of the configured trust domain, and has the ID that we were told
//     to have, or had before: a renewal never changes who we are.
//  3. It has begun, by our clock.
//  4. It verifies as a client's and as a server's against the bundle in use, as
//     our peers will do it. Only where the stream has not brought a bundle yet
//     do the roots in the answer count, which came from a CA that our trust
//     anchor vouches for.
func (a *Agent) take(signed *caclient.Signed, key crypto.Signer) error {
	svid, err := identity.NewSVID(signed.Chain, key)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s, now := &a.state, a.now()
	if td := svid.ID().TrustDomain(); td != a.td {
		return fmt.Errorf("the new certificate is for %s; this agent belongs to trust domain %q", svid.ID(), a.td)
	}
	if err := a.checkID(svid.ID()); err != nil {
		return err
	}
	if begins := svid.Leaf().NotBefore; now.Before(begins) {
		return &ClockError{Begins: begins, Now: now}
	}
	bundle := s.bundle
	if !s.streamed {
		bundle, err = identity.NewBundle(a.td, identity.BundleConfig{Authorities: signed.Roots})
		if err != nil {
			return err
		}
	}
	if err := believable(svid, bundle, now); err != nil {
		return err
	}
	s.svid, s.bundle, s.denied = svid, bundle, nil
	s.term = newTerm(now, svid.NotAfter(), a.conf.Draw())
	s.alarmed = false
	a.publishLocked()
	if s.first != nil {
		close(s.first)
		s.first = nil
	}
	return nil
}

// believable reports whether peers that hold bundle will accept svid in both
// roles.
func believable(svid *identity.SVID, bundle *identity.Bundle, now time.Time) error {
	_, err := identity.VerifyBoth(svid.Certificates(), bundle, now)
	return err
}

// apply takes over what the CA's stream says, or refuses it.
func (a *Agent) apply(w wire.Workload) error {
	lines, err := a.takeOver(w)
	if err == nil {
		a.metrics.bundles.WithLabelValues("ack").Inc()
		a.mu.Lock()
		a.state.refused = ""
		a.mu.Unlock()
	}
	for _, l := range lines {
		a.say(l)
	}
	return err
}

// takeOver also returns what there is to log.
func (a *Agent) takeOver(w wire.Workload) (lines []line, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s, now := &a.state, a.now()
	if err := a.checkID(w.ID); err != nil {
		return nil, err
	}
	if err := s.newer(w.Bundle); err != nil {
		return nil, err
	}
	// Each half is taken for itself: a policy that has to be refused must not keep
	// the mesh's authorities from coming in.
	newPolicy, refused := w.Policy.Succeeds(s.policy)
	if newPolicy {
		s.policy = w.Policy
	}
	changed := s.bundle == nil || !s.bundle.Equal(w.Bundle)
	// What verified against these authorities does so under another sequence.
	believed := s.bundle != nil && slices.EqualFunc(s.bundle.Authorities(), w.Bundle.Authorities(), (*x509.Certificate).Equal)
	s.bundle, s.streamed = w.Bundle, true
	if changed || newPolicy {
		a.publishLocked()
	}
	if newPolicy {
		lines = append(lines, line{slog.LevelInfo, "policy taken over", []any{
			"version", s.policy.Version, "workload_version", s.policy.WorkloadVersion, "mode", s.policy.Mode.String(), "source", s.policy.Source.String(), "ports", s.policy.DescribePorts()}})
	}
	if changed {
		lines = append(lines, line{slog.LevelInfo, "trust bundle taken over", []any{"trust_domain", a.td.String(),
			"sequence", w.Bundle.Sequence(), "authorities", len(w.Bundle.Authorities())}})
	}
	if s.svid == nil {
		return lines, refused
	}
	switch {
	case changed && !believed && s.valid(now) && believable(s.svid, s.bundle, now) != nil:
		// Peers with the same bundle have stopped to believe us.
		s.term.renewAt = now
		lines = append(lines, orphaned(s.svid, s.bundle))
	case !w.RenewAt.IsZero() && !w.RenewAt.Equal(s.obeyed) && w.RenewAt.Before(s.term.renewAt):
		s.obeyed, s.term.renewAt = w.RenewAt, w.RenewAt
	default:
		return lines, refused
	}
	a.wakeUp()
	return lines, refused
}

// newer returns why b must not take the place of the bundle in use; nil where
// it may.
func (s *state) newer(b *identity.Bundle) error {
	switch {
	case !s.streamed || b.Sequence() > s.bundle.Sequence():
		return nil
	case b.Sequence() < s.bundle.Sequence():
		return &StaleError{Held: s.bundle.Sequence(), Got: b.Sequence()}
	case !b.Equal(s.bundle):
		return &ConflictError{Sequence: b.Sequence(), Held: s.bundle, Got: b}
	}
	return nil
}

// orphaned is the line about a bundle that drops the authority of the
// certificate in use.
func orphaned(svid *identity.SVID, b *identity.Bundle) line {
	chain := svid.Certificates()
	return line{slog.LevelWarn, "the new trust bundle has no authority for the certificate in use, and peers refuse it from now on; renewing it at once", []any{
		"spiffe_id", svid.ID().String(), "serial", svid.Serial(),
		"authority", keyID(chain[len(chain)-1].AuthorityKeyId), "sequence", b.Sequence(), "bundle", describeKeys(b.Authorities()),
	}}
}

// describeKeys names authorities by their subject key identifiers.
func describeKeys(authorities []*x509.Certificate) string {
	const most = 4
	var b strings.Builder
	for i, c := range authorities {
		if i == most {
			fmt.Fprintf(&b, " and %d more", len(authorities)-most)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(keyID(c.SubjectKeyId))
	}
	return b.String()
}

// keyID bounds what a certificate may hold: any number of bytes.
func keyID(id []byte) string {
	if len(id) == 0 {
		return "(no key id)"
	}
	return hex.EncodeToString(id[:min(len(id), sha256.Size)])
}

// wakeUp makes the renewal loop look again.
func (a *Agent) wakeUp() {
	select {
	case a.wake <- struct{}{}:
	default: // it has been told already
	}
}
