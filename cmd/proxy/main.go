// Proxy is the small mTLS proxy beside a workload: it lets peers in over mutual
// TLS, as strictly as each port's mode says, and carries the workload's own
// connections out over mutual TLS.
//
// The package only wires: flags in, packages sds/client and proxy built
// bottom-up, run, drain.
package main

import (
	"os"

	"github.com/meshca/meshca/cmd/internal/cli"
)

func main() {
	os.Exit(cli.Main(newRoot(), os.Args[1:], os.Stdout, os.Stderr))
}
