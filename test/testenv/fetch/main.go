// Command fetch fills the test cache, so that tests find it full and slow
// steps show their progress, which go test would hide:
//
//	go run ./test/testenv/fetch [kubernetes] [envoy] [vault] [node] [coredns]
//
// Without arguments it gets what make test needs: kubernetes (the API server and
// etcd), envoy and vault. What a whole cluster needs beside them is node and coredns.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/meshca/meshca/test/testenv"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "fetch:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, wanted []string, stdout, stderr io.Writer) error {
	cache, err := testenv.OpenCache(stderr)
	if err != nil {
		return err
	}
	if len(wanted) == 0 {
		wanted = []string{"envoy", "kubernetes", "vault"}
	}
	// All are tried, so that one run tells everything that is missing.
	var errs []error
	for _, name := range wanted {
		switch name {
		case "envoy":
			path, err := testenv.Envoy(ctx, cache)
			errs = append(errs, err)
			if err == nil {
				fmt.Fprintln(stdout, path)
			}
		case "kubernetes":
			k, err := testenv.Kubernetes(ctx, cache)
			errs = append(errs, err)
			if err == nil {
				fmt.Fprintln(stdout, k.APIServer)
				fmt.Fprintln(stdout, k.Etcd)
			}
		case "node":
			n, err := testenv.Node(ctx, cache)
			errs = append(errs, err)
			if err == nil {
				fmt.Fprintln(stdout, filepath.Dir(n.Kubelet))
			}
		case "coredns":
			path, err := testenv.CoreDNS(ctx, cache)
			errs = append(errs, err)
			if err == nil {
				fmt.Fprintln(stdout, path)
			}
		case "vault":
			path, err := testenv.Vault(ctx, cache)
			errs = append(errs, err)
			if err == nil {
				fmt.Fprintln(stdout, path)
			}
		default:
			errs = append(errs, fmt.Errorf("unknown thing to get: %q; known are envoy, kubernetes, vault, node and coredns", name))
		}
	}
	return errors.Join(errs...)
}
