package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/ca/kube/report"
	"github.com/meshca/meshca/cmd/internal/cli"
)

// watchingFlags are those of commands that look at a mesh that runs.
type watchingFlags struct {
	cluster clusterFlags
	output  string
}

func (f *watchingFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.cluster.kubeconfig, "kubeconfig", "", "the file that says how to reach the cluster (as for kubectl: $KUBECONFIG, else ~/.kube/config)")
	c.Flags().StringVar(&f.cluster.context, "context", "", "the context in that file (its current one)")
	c.Flags().StringVar(&f.cluster.namespace, "ca-namespace", "meshca-system", "the namespace of the CA")
	outputFlag(c, &f.output)
}

// api is an API server with its clock.
type api struct {
	kubernetes.Interface
	config *rest.Config

	mu   sync.Mutex
	said time.Time // by the API server
	at   time.Time // when it said so
}

// open connects at the first request.
func (f *watchingFlags) open() (*api, error) {
	config, err := f.cluster.config()
	if err != nil {
		return nil, err
	}
	a := &api{config: config}
	config.QPS, config.Burst = 50, 100
	// Thousands of pods are smaller, and sooner read, in this form.
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return &dated{next, a} })
	a.Interface, err = kubernetes.NewForConfig(config)
	return a, err
}

// now is the API server's time, once it has answered: what is written in the cluster
// is dated by it, and a person's own clock may be anything.
func (a *api) now() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.said.IsZero() {
		return time.Now()
	}
	return a.said.Add(time.Since(a.at))
}

type dated struct {
	next http.RoundTripper
	api  *api
}

func (d *dated) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := d.next.RoundTrip(r)
	if err == nil {
		if at, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
			d.api.mu.Lock()
			d.api.said, d.api.at = at, time.Now()
			d.api.mu.Unlock()
		}
	}
	return resp, err
}

// reports reads what the replicas say. Without any that counts nothing can be told.
func (a *api) reports(ctx context.Context, namespace string) (report.Documents, error) {
	docs, err := report.Read(ctx, a.CoreV1().ConfigMaps(namespace), a.now)
	if err != nil || len(docs.Fresh) > 0 {
		return docs, err
	}
	if len(docs.Stale) == 0 {
		return docs, fmt.Errorf("no CA reports in namespace %q: is meshca installed there, and not just starting? --ca-namespace names another", namespace)
	}
	var texts []string
	for _, s := range docs.Stale {
		texts = append(texts, s.Replica+": "+s.Reason)
	}
	return docs, fmt.Errorf("no CA in namespace %q reports now, so nothing can be told of the mesh (%s); look at its pods: kubectl -n %s get pods", namespace, strings.Join(texts, "; "), namespace)
}

// untold makes an error of reading one that says so, with what to do.
func untold(err error) error {
	var usage *cli.UsageError
	if err == nil || errors.As(err, &usage) {
		return err
	}
	if apierrors.IsForbidden(err) {
		err = &cli.HintError{Err: err, Hint: "whoever runs this command needs that permission, and it only reads"}
	} else if apierrors.IsUnauthorized(err) {
		err = &cli.HintError{Err: err, Hint: "the kubeconfig's credentials have ended, or are another cluster's"}
	}
	return &cli.UnknownError{Err: err}
}

// progress says on a terminal's error stream what is awaited, once that has taken a
// second.
type progress struct {
	mu   sync.Mutex
	text string
	stop func()
	wait sync.WaitGroup
}

func newProgress(ctx context.Context, w io.Writer, text string) *progress {
	p := &progress{text: text}
	ctx, cancel := context.WithCancel(ctx)
	p.stop = func() { cancel(); p.wait.Wait() }
	p.wait.Go(func() {
		tick, last := time.NewTicker(time.Second), ""
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			p.mu.Lock()
			text := p.text
			p.mu.Unlock()
			if text != last {
				fmt.Fprintln(w, text)
				last = text
			}
		}
	})
	return p
}

func (p *progress) say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text = fmt.Sprintf(format, args...)
}

// marks are how a result is marked.
type marks struct{ holds, attention, fails, unknown string }

// marksFor are those that the locale can show.
func marksFor(getenv func(string) string) marks {
	locale := ""
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if locale = getenv(name); locale != "" {
			break
		}
	}
	locale = strings.ToLower(strings.ReplaceAll(locale, "-", ""))
	if strings.Contains(locale, "utf8") {
		return marks{"✓", "!", "✗", "?"}
	}
	return marks{"ok", "!!", "xx", "??"}
}

func localMarks() marks { return marksFor(os.Getenv) }
