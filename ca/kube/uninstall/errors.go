package uninstall

import (
	"fmt"
	"strings"

	"github.com/meshca/meshca/ca/kube/volumes"
)

// most is how many pods a text names.
const most = 3

// MountedError says that pods have a volume of ours.
type MountedError struct {
	Pods []volumes.Pod
	// Late says that the agents are gone already: these pods came meanwhile.
	Late bool
}

func (e *MountedError) Error() string {
	if e.Late {
		return fmt.Sprintf("uninstalling: %s came while the agents were taken away, and will not start or end without them: %s; apply the manifest again, have them end, and uninstall again",
			count(len(e.Pods)), names(e.Pods))
	}
	return fmt.Sprintf("refusing to uninstall: %s a volume of %s: %s; without an agent their certificates end and their pods cannot",
		have(len(e.Pods)), volumes.Driver, names(e.Pods))
}

func count(n int) string {
	if n == 1 {
		return "1 pod"
	}
	return fmt.Sprintf("%d pods", n)
}

func have(n int) string {
	if n == 1 {
		return "1 pod has"
	}
	return fmt.Sprintf("%d pods have", n)
}

func names(pods []volumes.Pod) string {
	var all []string
	for _, p := range pods[:min(len(pods), most)] {
		all = append(all, p.String())
	}
	if more := len(pods) - len(all); more > 0 {
		all = append(all, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(all, ", ")
}

// ReleaseError says that Helm has installed what is there.
type ReleaseError struct{ Name, Namespace string }

func (e *ReleaseError) Error() string {
	return fmt.Sprintf("refusing to uninstall: this is Helm's release %q of namespace %q, which would go on believing that it is installed", e.Name, e.Namespace)
}

// DomainError says that the root is another trust domain's than the one that was
// typed.
type DomainError struct{ Typed, Held string }

func (e *DomainError) Error() string {
	return fmt.Sprintf("refusing to delete the root: it is of trust domain %q, and you have typed %q; nothing is changed", e.Held, e.Typed)
}
