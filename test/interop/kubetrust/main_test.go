package kubetrust

import (
	"testing"

	"github.com/meshca/meshca/test/kubetest"
)

// cluster is shared by all tests here, one after another: a distributor writes to every
// namespace that asks for it, so each test cleans up after itself.
var cluster kubetest.Shared

func TestMain(m *testing.M) { kubetest.Main(m, &cluster) }
