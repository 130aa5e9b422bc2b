// Package watches begins watches at an API server that end by themselves, and that
// are there when it says so.
package watches

import (
	"context"
	"errors"
	"math/rand/v2"
	"reflect"
	"time"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// Lasts is how long one watch lasts, and up to half as long again; the API server
// sends a bookmark at its end, and the next one goes on where it was, so it costs next
// to nothing. It is short so that a permission that was withdrawn shows: the API
// server ends no watch for that.
const Lasts = time.Minute

// Grace is how much longer it may take the API server to end one. A watch that is
// silent for ever is not believed.
const Grace = 15 * time.Second

// errNoAnswer is what client-go does not say.
var errNoAnswer = errors.New("the connection to the API server ended, or nothing came, before there was an answer; see that it is up, and what is between it and here")

// Begin begins a watch by do, which asks the API server with the options it gets. It
// ends when ctx does, and after [Lasts] and a half at the latest.
func Begin(ctx context.Context, o meta.ListOptions, do func(context.Context, meta.ListOptions) (watch.Interface, error)) (watch.Interface, error) {
	lasts := Lasts + rand.N(Lasts/2)
	seconds := int64(lasts / time.Second)
	o.TimeoutSeconds = &seconds
	ctx, cancel := context.WithTimeout(ctx, lasts+Grace)
	w, err := do(ctx, o)
	if err == nil && reflect.TypeOf(w) == nothing {
		err = errNoAnswer
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return &bounded{w, cancel}, nil
}

// nothing is what client-go returns in place of an error where connections end before
// an answer: a watch that has ended. Taken for a watch, it would say that all is
// known that has happened, of an API server that nobody reaches.
var nothing = reflect.TypeOf(watch.NewEmptyWatch())

// bounded is a watch under a deadline.
type bounded struct {
	watch.Interface
	cancel context.CancelFunc
}

func (b *bounded) Stop() {
	b.Interface.Stop()
	b.cancel()
}
