package apitest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// Object is any object: its JSON, as far as a test needs it.
type Object map[string]any

// API is the server. The zero value is ready. Its methods may be called
// concurrently.
type API struct {
	// Answer, if any, may answer a request in place of the server: nil leaves it.
	// Set it before the first request.
	Answer func(*http.Request) *http.Response
	// Broken, if any, says with what error a request's connection ends before an
	// answer; nil is none. Set it before the first request.
	Broken func(*http.Request) error

	mu       sync.Mutex
	version  int
	objects  map[string]map[string]Object // resource, then namespace/name
	events   []event                      // all that ever happened
	lag      time.Duration                // of watches, behind all else
	changed  chan struct{}
	cut      chan struct{} // closed to end all watches
	requests map[string]int
	oldest   int // events before it are compacted
}

type event struct {
	version  int
	at       time.Time
	resource string
	kind     string // ADDED and so on
	object   Object
}

// Config returns how to reach the server.
func (a *API) Config() *rest.Config { return &rest.Config{Host: "https://api.test", Transport: a} }

// Put makes or changes an object; spec and the like are taken as they are.
func (a *API) Put(resource string, o Object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	kind := "MODIFIED"
	if a.objects == nil {
		a.objects = make(map[string]map[string]Object)
	}
	if a.objects[resource] == nil {
		a.objects[resource] = make(map[string]Object)
	}
	if _, ok := a.objects[resource][keyOf(o)]; !ok {
		kind = "ADDED"
	}
	a.objects[resource][keyOf(o)] = a.happenedLocked(resource, kind, o)
}

// Delete removes an object; Delete of one that is not there does nothing.
func (a *API) Delete(resource, namespace, name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	key := namespace + "/" + name
	if o, ok := a.objects[resource][key]; ok {
		delete(a.objects[resource], key)
		a.happenedLocked(resource, "DELETED", o)
	}
}

func (a *API) happenedLocked(resource, kind string, o Object) Object {
	a.version++
	next := Object{}
	for k, v := range o {
		next[k] = v
	}
	m := map[string]any{}
	if old, ok := o["metadata"].(map[string]any); ok {
		for k, v := range old {
			m[k] = v
		}
	}
	m["resourceVersion"] = strconv.Itoa(a.version)
	next["metadata"] = m
	a.events = append(a.events, event{a.version, time.Now(), resource, kind, next})
	a.wakeLocked()
	return next
}

func (a *API) wakeLocked() {
	if a.changed != nil {
		close(a.changed)
		a.changed = nil
	}
}

// Lag has watches report everything so much later.
func (a *API) Lag(by time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.lag = by
	a.wakeLocked()
}

// Cut ends all watches; with compact, they cannot go on where they were, as with an
// API server that was restarted. Lists of older versions can still be had, as there.
func (a *API) Cut(compact bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cut != nil {
		close(a.cut)
		a.cut = nil
	}
	if compact {
		a.oldest = a.version + 1
	}
}

// Requests returns how many requests of a kind there were: "get pods" and so on.
func (a *API) Requests(what string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests[what]
}

// RoundTrip answers a request.
func (a *API) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	resource, namespace, name := parse(req.URL.Path)
	verb := "list"
	switch {
	case req.URL.Query().Get("watch") == "true":
		verb = "watch"
	case name != "":
		verb = "get"
	}
	a.mu.Lock()
	if a.requests == nil {
		a.requests = make(map[string]int)
	}
	a.requests[verb+" "+resource]++
	a.mu.Unlock()
	if a.Broken != nil {
		if err := a.Broken(req); err != nil {
			return nil, err
		}
	}
	if a.Answer != nil {
		resp := a.Answer(req)
		if err := req.Context().Err(); err != nil {
			return nil, err
		}
		if resp != nil {
			return resp, nil
		}
	}
	switch verb {
	case "watch":
		return a.watch(req, resource), nil
	case "get":
		return a.get(resource, namespace, name), nil
	}
	return a.list(resource, req.URL.Query()), nil
}

func parse(path string) (resource, namespace, name string) {
	parts := strings.Split(strings.TrimPrefix(path, "/api/v1/"), "/")
	if parts[0] == "namespaces" && len(parts) > 2 {
		namespace, parts = parts[1], parts[2:]
	}
	if len(parts) > 1 {
		name = parts[1]
	}
	return parts[0], namespace, name
}

func (a *API) get(resource, namespace, name string) *http.Response {
	a.mu.Lock()
	defer a.mu.Unlock()
	o, ok := a.objects[resource][namespace+"/"+name]
	if !ok {
		return Status(http.StatusNotFound, meta.StatusReasonNotFound, 0)
	}
	return respond(http.StatusOK, typed(resource, "", o))
}

// list answers with what there is or, since a version with a limit asks for that very
// version, with what there was.
func (a *API) list(resource string, asked url.Values) *http.Response {
	a.mu.Lock()
	defer a.mu.Unlock()
	objects, version := a.objects[resource], a.version
	if exact, _ := strconv.Atoi(asked.Get("resourceVersion")); exact > 0 && asked.Has("limit") {
		objects, version = a.atLocked(resource, exact), exact
	}
	items := []Object{}
	for _, o := range objects {
		items = append(items, typed(resource, "", o))
	}
	list := typed(resource, "List", Object{"items": items, "metadata": map[string]any{"resourceVersion": strconv.Itoa(version)}})
	return respond(http.StatusOK, list)
}

func (a *API) atLocked(resource string, version int) map[string]Object {
	objects := make(map[string]Object)
	for _, e := range a.events {
		switch {
		case e.version > version || e.resource != resource:
		case e.kind == "DELETED":
			delete(objects, keyOf(e.object))
		default:
			objects[keyOf(e.object)] = e.object
		}
	}
	return objects
}

// watch streams what has happened since a version, bookmarks every minute, and ends
// after the time that was asked for.
func (a *API) watch(req *http.Request, resource string) *http.Response {
	from, _ := strconv.Atoi(req.URL.Query().Get("resourceVersion"))
	seconds, _ := strconv.Atoi(req.URL.Query().Get("timeoutSeconds"))
	a.mu.Lock()
	tooOld := from+1 < a.oldest
	if a.cut == nil {
		a.cut = make(chan struct{})
	}
	cut := a.cut
	a.mu.Unlock()
	if tooOld {
		return Status(http.StatusGone, meta.StatusReasonExpired, 0)
	}
	body, out := io.Pipe()
	go func() {
		defer out.Close()
		end := time.NewTimer(time.Duration(seconds) * time.Second)
		defer end.Stop()
		bookmark := time.NewTicker(time.Minute)
		defer bookmark.Stop()
		for {
			ready, wait, changed := a.since(from, resource)
			for _, e := range ready {
				from = e.version
				if e.resource != resource {
					continue
				}
				if write(out, e.kind, typed(resource, "", e.object)) != nil {
					return
				}
			}
			var later <-chan time.Time
			if wait > 0 {
				later = time.After(wait)
			}
			select {
			case <-req.Context().Done():
				return
			case <-cut:
				return
			case <-end.C:
				return
			case <-bookmark.C:
				o := Object{"metadata": map[string]any{"resourceVersion": strconv.Itoa(from)}}
				if write(out, "BOOKMARK", typed(resource, "", o)) != nil {
					return
				}
			case <-changed:
			case <-later:
			}
		}
	}()
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}}, Body: body}
}

// since returns what a watch may report now, and when to look again.
func (a *API) since(version int, resource string) (ready []event, wait time.Duration, changed <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.changed == nil {
		a.changed = make(chan struct{})
	}
	for _, e := range a.events[min(version, len(a.events)):] {
		if left := a.lag - time.Since(e.at); left > 0 {
			return ready, left, a.changed
		}
		ready = append(ready, e)
	}
	return ready, 0, a.changed
}

func write(w io.Writer, kind string, o Object) error {
	return json.NewEncoder(w).Encode(map[string]any{"type": kind, "object": o})
}

// typed gives an object the type that its client expects: of all but pods, metadata
// alone is asked for.
func typed(resource, suffix string, o Object) Object {
	next := Object{"kind": "PartialObjectMetadata" + suffix, "apiVersion": "meta.k8s.io/v1"}
	if resource == "pods" {
		next = Object{"kind": "Pod" + suffix, "apiVersion": "v1"}
	}
	for k, v := range o {
		next[k] = v
	}
	return next
}

// Status makes the answer of an API server that refuses. A retryAfter of zero is not
// said.
func Status(code int, reason meta.StatusReason, retryAfter int) *http.Response {
	resp := respond(code, Object{
		"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": string(reason), "code": code,
		"message": fmt.Sprintf("%d by the test", code),
	})
	if retryAfter > 0 {
		resp.Header.Set("Retry-After", strconv.Itoa(retryAfter))
	}
	return resp
}

func respond(code int, body Object) *http.Response {
	b, err := json.Marshal(body)
	if err != nil {
		panic(err) // a test's own object
	}
	return &http.Response{
		StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(b)), ContentLength: int64(len(b)),
	}
}

func keyOf(o Object) string {
	m, _ := o["metadata"].(map[string]any)
	namespace, _ := m["namespace"].(string)
	name, _ := m["name"].(string)
	return namespace + "/" + name
}
