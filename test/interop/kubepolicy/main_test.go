package kubepolicy

import (
	"testing"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"

	"github.com/meshca/meshca/test/kubetest"
)

// cluster is shared by all tests here, which run one after the other: there is one
// definition of PeerAuthentication.
var cluster kubetest.Shared

func TestMain(m *testing.M) {
	klog.SetLogger(logr.Discard()) // trouble is made on purpose
	kubetest.Main(m, &cluster)
}
