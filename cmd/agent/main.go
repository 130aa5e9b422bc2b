// Agent gets certificates from the CA and hands them out on a Unix socket: to
// Envoy over SDS, to programs over the SPIFFE Workload API. One process holds
// one identity, that of the token file it is given, or, as agent node, those of
// all pods of a Kubernetes node.
//
// The package only wires: flags and configuration in, packages agent, agent/csi
// and sds built bottom-up, run, drain.
package main

import (
	"os"

	"github.com/meshca/meshca/cmd/internal/cli"
)

func main() {
	os.Exit(cli.Main(newRoot(), os.Args[1:], os.Stdout, os.Stderr))
}
