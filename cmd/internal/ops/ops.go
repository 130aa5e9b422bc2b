// Package ops serves what an operator and a kubelet look at: readiness,
// liveness, metrics and, only when asked for, pprof. It is plain HTTP without
// authentication, for loopback or the operator's own network, and answers
// nothing that is secret.
package ops

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Whoever reaches the address may ask, and must not fill the memory by that. Each
// connection answers one question, so that none is idle, and whoever says nothing, or
// reads nothing, gives its place up soon.
const (
	maxConnections = 256
	headerTimeout  = 5 * time.Second
	writeTimeout   = 15 * time.Second // package pprof adds how long a profile takes
)

// NewRegistry returns a registry for a program's metrics that has those of the
// Go runtime and of the process already.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Config says what to serve.
type Config struct {
	// Ready returns nil while the program can do its work, and otherwise why
	// not. It is called once for each request and must answer at once.
	Ready   func() error
	Metrics prometheus.Gatherer
	// Profiles adds /debug/pprof/. Profiles show code and timing, and heap
	// profiles show call stacks that touch keys, though no key: off by default.
	Profiles bool
	Log      *slog.Logger
}

// Handler returns the endpoints: /livez, /readyz, /metrics.
//
// /livez says that the process turns; it never looks at anything outside, so
// that a CA whose upstream is away is not restarted, which would lose the
// intermediate that it still signs with.
func Handler(c Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := c.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.Metrics, promhttp.HandlerOpts{ErrorLog: errorLog{c.Log}}))
	if c.Profiles {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// Endpoint is the address that operations are served on, if any. It is opened
// before a program starts anything, so that an address that is taken stops the
// start.
type Endpoint struct {
	l net.Listener // nil for none
}

// Open listens on an address; an empty one means that nothing is served.
func Open(address string) (*Endpoint, error) {
	if address == "" {
		return &Endpoint{}, nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening for operations: %w; choose another --ops-listen", err)
	}
	return &Endpoint{l}, nil
}

// Address is where operations are served, with the port that a port of 0
// became; empty for nowhere.
func (e *Endpoint) Address() string {
	if e.l == nil {
		return ""
	}
	return e.l.Addr().String()
}

// Close gives the address back, for a start that comes to nothing after all.
func (e *Endpoint) Close() error {
	if e.l == nil {
		return nil
	}
	return e.l.Close()
}

// Serve answers until ctx ends, and closes the endpoint. Where there is none it
// returns at once.
func (e *Endpoint) Serve(ctx context.Context, c Config) error {
	if e.l == nil {
		return nil
	}
	srv := &http.Server{
		Handler:           Handler(c),
		ReadHeaderTimeout: headerTimeout,
		WriteTimeout:      writeTimeout,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(c.Log.Handler(), slog.LevelDebug),
	}
	srv.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(netutil.LimitListener(e.l, maxConnections)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving operations on %s: %w", e.l.Addr(), err)
	}
	return nil
}

// errorLog takes what promhttp has to say when gathering fails.
type errorLog struct{ log *slog.Logger }

func (l errorLog) Println(v ...any) { l.log.Warn("gathering metrics", "error", fmt.Sprint(v...)) }
