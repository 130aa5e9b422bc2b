package report

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// Fresh is how old a document may be to count.
const Fresh = 15 * time.Second

// Documents are those of all replicas.
type Documents struct {
	Fresh []*Document
	Stale []Stale
}

// Stale is a document that does not count.
type Stale struct {
	Replica, Reason string
	Written         time.Time // by the API server's clock
}

// Read returns what the replicas have written. Now returns the API server's time once
// it has answered.
func Read(ctx context.Context, client typedcorev1.ConfigMapInterface, now func() time.Time) (Documents, error) {
	list, err := client.List(ctx, metav1.ListOptions{LabelSelector: labelSelector})
	if err != nil {
		return Documents{}, fmt.Errorf("reading what the CA's replicas report: %w", err)
	}
	var all Documents
	for _, o := range list.Items {
		if !strings.HasPrefix(o.Name, "meshca-replica-") {
			continue
		}
		d, err := Parse([]byte(o.Data[key]))
		switch {
		case err != nil:
			all.Stale = append(all.Stale, Stale{o.Name, err.Error(), writtenAt(&o, time.Time{})})
			continue
		case d.Replica == "":
			continue
		}
		written := writtenAt(&o, d.Written)
		// The API server's times are whole seconds.
		if age := now().Truncate(time.Second).Sub(written.Truncate(time.Second)); age > Fresh {
			all.Stale = append(all.Stale, Stale{d.Replica, fmt.Sprintf("it was last heard from %v ago", age), written})
			continue
		}
		all.Fresh = append(all.Fresh, d)
	}
	slices.SortFunc(all.Fresh, func(a, b *Document) int { return strings.Compare(a.Replica, b.Replica) })
	return all, nil
}
