package vault

import (
	"testing"

	"github.com/meshca/meshca/test/kubetest"
)

// cluster is shared by the tests of Kubernetes auth.
var cluster kubetest.Shared

func TestMain(m *testing.M) { kubetest.Main(m, &cluster) }
