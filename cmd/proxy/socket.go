package main

import (
	"net/url"
	"os"
	"strings"

	"github.com/meshca/meshca/cmd/internal/cli"
)

// Where the agent's socket is when nothing is said.
const (
	socketEnv     = "SPIFFE_ENDPOINT_SOCKET"
	defaultSocket = "agent.sock"
)

// agentSocket is the path of the agent's socket: of --socket, or else of the
// variable that every SPIFFE client obeys (SPIFFE_Workload_Endpoint §4).
func (o *options) agentSocket() (string, error) {
	if o.socketGiven {
		if o.socket == "" {
			return "", cli.Usagef("--socket is empty; it is where the certificate comes from")
		}
		return o.socket, nil
	}
	value, ok := os.LookupEnv(socketEnv)
	if !ok || value == "" {
		return defaultSocket, nil
	}
	u, err := url.Parse(value)
	switch {
	case err != nil:
		return "", cli.Usagef("%s %q is no URI; give unix:///path/to/agent.sock, or --socket", socketEnv, value)
	case u.Scheme == "tcp":
		return "", cli.Usagef("%s is %q; the agent serves on a Unix socket only: give unix:///path/to/agent.sock, or --socket", socketEnv, value)
	case u.Scheme != "unix" || u.Host != "" || u.User != nil || u.Opaque != "" || u.RawQuery != "" || u.Fragment != "" || !strings.HasPrefix(u.Path, "/") || u.Path == "/":
		return "", cli.Usagef("%s %q is not unix:// and an absolute path; give unix:///path/to/agent.sock, or --socket", socketEnv, value)
	}
	return u.Path, nil
}
