package kubereport

import (
	"testing"

	"github.com/meshca/meshca/test/kubetest"
)

// cluster is shared by all tests here; they keep apart by namespaces of their own.
var cluster kubetest.Shared

func TestMain(m *testing.M) { kubetest.Main(m, &cluster) }
