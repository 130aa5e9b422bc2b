package events

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	core "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

const (
	controller  = "meshca.dev/meshca"
	callTimeout = 5 * time.Second
	maxNote     = 1024 // bytes, as the API has it
	maxName     = 253
	maxInstance = 128
)

// write makes an event, or writes the count of the one that is there. It returns
// the event's name.
func (w *Writer) write(ctx context.Context, k key, s series) (name string, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	in := w.conf.Client.Resource(eventsv1.SchemeGroupVersion.WithResource("events")).Namespace(k.namespace)
	if s.name != "" {
		patch, err := json.Marshal(map[string]any{"series": eventsv1.EventSeries{Count: max(s.count, 2), LastObservedTime: meta.NewMicroTime(s.last)}})
		if err != nil {
			return "", err
		}
		_, err = in.Patch(ctx, s.name, types.MergePatchType, patch, meta.PatchOptions{})
		if !apierrors.IsNotFound(err) {
			return s.name, explain("patch", k, err)
		} // else it has expired, or somebody has deleted it
	}
	e := w.event(k, s)
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(e)
	if err != nil {
		return "", err
	}
	_, err = in.Create(ctx, &unstructured.Unstructured{Object: content}, meta.CreateOptions{})
	return e.Name, explain("create", k, err)
}

func (w *Writer) event(k key, s series) *eventsv1.Event {
	e := &eventsv1.Event{
		TypeMeta:            meta.TypeMeta{APIVersion: eventsv1.SchemeGroupVersion.String(), Kind: "Event"},
		ObjectMeta:          meta.ObjectMeta{Namespace: k.namespace, Name: nameOf(k, w.conf.Instance, s.last)},
		EventTime:           meta.NewMicroTime(s.last),
		ReportingController: controller,
		ReportingInstance:   w.conf.Instance[:min(len(w.conf.Instance), maxInstance)],
		Action:              k.action,
		Reason:              k.reason,
		Note:                k.note,
		Type:                k.kind,
		Regarding: core.ObjectReference{
			APIVersion: k.apiVersion, Kind: k.object.kind, Namespace: k.namespace, Name: k.name, UID: types.UID(k.uid),
		},
	}
	if s.count > 1 {
		e.Series = &eventsv1.EventSeries{Count: s.count, LastObservedTime: meta.NewMicroTime(s.last)}
	}
	return e
}

// nameOf makes a name that two replicas, or two instants, do not share.
func nameOf(k key, instance string, at time.Time) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %q %d", k.uid, k.reason, k.note, instance, at.UnixNano()))
	suffix := fmt.Sprintf(".%x", sum[:8])
	return strings.TrimRight(k.name[:min(len(k.name), maxName-len(suffix))], "-.") + suffix
}

// explain says what was tried. A namespace that is about to go takes no more
// events, and that is nobody's fault.
func explain(verb string, k key, err error) error {
	switch {
	case err == nil, apierrors.IsNotFound(err), apierrors.HasStatusCause(err, core.NamespaceTerminatingCause):
		return nil
	case apierrors.IsForbidden(err):
		return fmt.Errorf("the CA may not %s events.events.k8s.io in namespace %q; give its ServiceAccount that permission: %w", verb, k.namespace, err)
	}
	return fmt.Errorf("asking the API server to %s an event about %s %s/%s: %w", verb, k.object.kind, k.namespace, k.name, err)
}

// clean makes one printable line of a text that others may have had a part in, and
// bounds it.
func clean(s string) string {
	var b strings.Builder
	for i, r := range s {
		next := string(r)
		if r == utf8.RuneError || !strconv.IsPrint(r) {
			_, size := utf8.DecodeRuneInString(s[i:])
			quoted := strconv.Quote(s[i : i+size])
			next = quoted[1 : len(quoted)-1]
		}
		const more = "…"
		if b.Len()+len(next)+len(more) > maxNote {
			b.WriteString(more)
			break
		}
		b.WriteString(next)
	}
	return b.String()
}
