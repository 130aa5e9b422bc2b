package main

import (
	"strconv"
	"strings"

	"github.com/meshca/meshca/cmd/internal/cli"
	"github.com/meshca/meshca/identity"
	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/proxy"
)

// settings are the flags, understood.
type settings struct {
	inbound  []proxy.Inbound
	outbound []proxy.Outbound
	socket   string
	modes    *fixedModes // nil: what the agent says holds
}

// parse finds what is missing or does not go together before anything starts.
func (o *options) parse() (settings, error) {
	var s settings
	switch {
	case len(o.inbound)+len(o.outbound) == 0:
		return s, cli.Usagef("there is nothing to do; give --inbound, --outbound or both")
	case o.pprof && o.opsListen == "":
		return s, cli.Usagef("--pprof is served on --ops-listen, which is empty; give an address or leave --pprof out")
	case o.detectionTime <= 0 || o.handshakeTime <= 0 || o.drainTime <= 0:
		return s, cli.Usagef("--detection-time, --handshake-time and --drain-time must be longer than nothing")
	case o.maxConnections <= 0 || o.maxHandshakes <= 0:
		return s, cli.Usagef("--max-connections and --max-handshakes-per-source must be at least 1")
	}
	for _, text := range o.inbound {
		listen, app, ok := strings.Cut(text, "=")
		if !ok {
			return s, cli.Usagef("--inbound %q is not ADDR=APP, as in :8443=127.0.0.1:8080", text)
		}
		s.inbound = append(s.inbound, proxy.Inbound{Listen: listen, App: app})
	}
	for _, text := range o.outbound {
		out, err := parseOutbound(text)
		if err != nil {
			return s, err
		}
		s.outbound = append(s.outbound, out)
	}
	var err error
	if s.socket, err = o.agentSocket(); err != nil {
		return s, err
	}
	if !o.fixed {
		if len(o.portModes) > 0 {
			return s, cli.Usagef("--port-mode goes with --mode; without that the agent's policies decide, ports and all")
		}
		return s, nil
	}
	s.modes, err = parseModes(o.mode, o.portModes)
	return s, err
}

func parseOutbound(text string) (proxy.Outbound, error) {
	listen, rest, _ := strings.Cut(text, "=")
	target, id, ok := strings.Cut(rest, ",")
	if !ok {
		return proxy.Outbound{}, cli.Usagef("--outbound %q is not LISTEN=TARGET,SPIFFE-ID, as in 127.0.0.1:15001=10.0.3.7:8443,spiffe://example.org/ns/shop/sa/cart", text)
	}
	peer, err := identity.ParseID(id)
	if err != nil {
		return proxy.Outbound{}, cli.Usagef("--outbound %q: %w", text, err)
	}
	return proxy.Outbound{Listen: listen, Target: target, Peer: peer}, nil
}

// fixedModes is a [proxy.Policy] that the command line decides for good.
type fixedModes struct {
	all   policy.Mode
	ports map[uint16]policy.Mode
}

func parseModes(all string, ports []string) (*fixedModes, error) {
	m := &fixedModes{ports: make(map[uint16]policy.Mode)}
	var err error
	if m.all, err = parseMode("--mode", all); err != nil {
		return nil, err
	}
	for _, text := range ports {
		number, mode, ok := strings.Cut(text, "=")
		port, err := strconv.ParseUint(number, 10, 16)
		if !ok || err != nil || port == 0 {
			return nil, cli.Usagef("--port-mode %q is not PORT=MODE, as in 9090=DISABLE", text)
		}
		if _, twice := m.ports[uint16(port)]; twice {
			return nil, cli.Usagef("--port-mode %q: port %d has a mode already", text, port)
		}
		if m.ports[uint16(port)], err = parseMode("--port-mode "+number, mode); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// parseMode takes the three modes that a port can be in, and nothing else: a
// mistake must not become some mode.
func parseMode(flag, text string) (policy.Mode, error) {
	mode, _ := policy.ParseMode(text)
	switch mode {
	case policy.Strict, policy.Permissive, policy.Disable:
		return mode, nil
	}
	return policy.Strict, cli.Usagef("%s: %q is none of STRICT, PERMISSIVE and DISABLE", flag, text)
}

// Decide names the flag that decided.
func (m *fixedModes) Decide(port uint16) (proxy.Decision, error) {
	if mode, ok := m.ports[port]; ok {
		return proxy.Decision{Mode: mode, Source: "--port-mode"}, nil
	}
	return proxy.Decision{Mode: m.all, Source: "--mode"}, nil
}

// Changed never fires.
func (m *fixedModes) Changed() <-chan struct{} { return nil }

// unused returns the ports that have a mode of their own and no listener.
func (m *fixedModes) unused(inbound []proxy.Inbound) []uint16 {
	used := make(map[uint16]bool)
	for _, in := range inbound {
		used[in.AppPort()] = true
	}
	var all []uint16
	for port := range m.ports {
		if !used[port] {
			all = append(all, port)
		}
	}
	return all
}
