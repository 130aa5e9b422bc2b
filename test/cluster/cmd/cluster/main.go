// Cluster brings the test cluster up and takes it down: cluster up, cluster down.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/meshca/meshca/test/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 1 {
		switch args[0] {
		case "up":
			_, err := cluster.Up(ctx, cluster.DefaultDir(), os.Stderr)
			return err
		case "down":
			c, err := cluster.Open(cluster.DefaultDir(), os.Stderr)
			if err != nil {
				return err
			}
			return c.Down(ctx)
		}
	}
	return fmt.Errorf("use: cluster up | down; it lives in $MESHCA_CLUSTER, or else in %s", cluster.DefaultDir())
}
