package kube

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/meshca/meshca/test/kubetest"
)

// cluster is shared by all tests here; they keep apart by namespaces of their own.
var cluster kubetest.Shared

func TestMain(m *testing.M) {
	code := m.Run()
	if err := cluster.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}
