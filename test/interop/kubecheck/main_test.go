package kubecheck

import (
	"testing"

	"github.com/meshca/meshca/test/kubetest"
)

// cluster is shared by all tests here; each puts right what it has changed.
var cluster kubetest.Shared

func TestMain(m *testing.M) { kubetest.Main(m, &cluster) }
