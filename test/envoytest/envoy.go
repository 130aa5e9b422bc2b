package envoytest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/meshca/meshca/test/testenv"
)

// Envoy is a running Envoy. Its methods may be called concurrently.
type Envoy struct {
	process *testenv.Process
	admin   string
	client  *http.Client
}

// Start runs the Envoy with its files in dir. It returns once the admin
// interface answers, which is before any secret has arrived; see
// [Envoy.WaitReady] for after.
func Start(ctx context.Context, binary, dir string, b Bootstrap) (*Envoy, error) {
	config, err := b.encode()
	if err != nil {
		return nil, fmt.Errorf("writing Envoy's bootstrap: %w", err)
	}
	configFile := filepath.Join(dir, "envoy.json")
	if err := os.WriteFile(configFile, config, 0o600); err != nil {
		return nil, fmt.Errorf("writing Envoy's bootstrap: %w", err)
	}
	return StartFile(ctx, binary, dir, configFile)
}

// StartFile is [Start] with a bootstrap that somebody else wrote. Its admin
// interface has to be on, on any port.
func StartFile(ctx context.Context, binary, dir, configFile string) (*Envoy, error) {
	addressFile := filepath.Join(dir, "envoy-admin")
	if err := os.RemoveAll(addressFile); err != nil { // of an Envoy before this one
		return nil, err
	}
	e := &Envoy{client: &http.Client{Transport: &http.Transport{}}}
	var err error
	e.process, err = testenv.Start(filepath.Join(dir, "envoy.log"), binary,
		"--config-path", configFile,
		"--admin-address-path", addressFile,
		"--disable-hot-restart", // several at once need no shared memory segments of their own
		"--concurrency", "2",
		"--drain-time-s", "1",
		"--log-level", "warning",
	)
	if err != nil {
		return nil, err
	}
	err = e.poll(ctx, "Envoy's admin interface", func() error {
		address, err := os.ReadFile(addressFile)
		if err != nil {
			return err
		}
		e.admin = "http://" + strings.TrimSpace(string(address))
		_, err = e.get(ctx, "/server_info")
		return err
	})
	if err != nil {
		return nil, errors.Join(err, e.Kill())
	}
	return e, nil
}

// WaitReady returns once every listener listens, which takes its secrets.
func (e *Envoy) WaitReady(ctx context.Context) error {
	return e.poll(ctx, "Envoy's listeners", func() error {
		_, err := e.get(ctx, "/ready")
		return err
	})
}

// WaitStat returns once the counter or gauge is at least the value.
func (e *Envoy) WaitStat(ctx context.Context, name string, atLeast uint64) error {
	return e.poll(ctx, fmt.Sprintf("Envoy's %s to reach %d", name, atLeast), func() error {
		stats, err := e.Stats(ctx, name)
		if err != nil {
			return err
		}
		if got := stats[name]; got < atLeast {
			return fmt.Errorf("it is %d", got)
		}
		return nil
	})
}

// Stats returns the counters and gauges whose names contain the text.
func (e *Envoy) Stats(ctx context.Context, containing string) (map[string]uint64, error) {
	body, err := e.get(ctx, "/stats")
	if err != nil {
		return nil, err
	}
	stats := make(map[string]uint64)
	for line := range strings.Lines(string(body)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if !ok || !strings.Contains(name, containing) {
			continue
		}
		if n, err := strconv.ParseUint(value, 10, 64); err == nil { // histograms and texts are not numbers
			stats[name] = n
		}
	}
	return stats, nil
}

// Address is host:port of the listener.
func (e *Envoy) Address(ctx context.Context, listener string) (string, error) {
	body, err := e.get(ctx, "/listeners?format=json")
	if err != nil {
		return "", err
	}
	var answer struct {
		Statuses []struct {
			Name  string `json:"name"`
			Local struct {
				Socket struct {
					Address string `json:"address"`
					Port    int    `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return "", fmt.Errorf("reading Envoy's listeners: %w", err)
	}
	for _, s := range answer.Statuses {
		if s.Name == listener {
			return net.JoinHostPort(s.Local.Socket.Address, strconv.Itoa(s.Local.Socket.Port)), nil
		}
	}
	return "", fmt.Errorf("Envoy has no listener %q: %s", listener, body)
}

// Config returns Envoy's whole configuration as it says it is, secrets'
// private keys left out by Envoy.
func (e *Envoy) Config(ctx context.Context) ([]byte, error) {
	return e.get(ctx, "/config_dump?include_eds")
}

// Process is the Envoy's process.
func (e *Envoy) Process() *testenv.Process { return e.process }

// Stop ends Envoy and returns when it is gone.
func (e *Envoy) Stop() error {
	e.client.CloseIdleConnections()
	return e.process.Stop(5 * time.Second)
}

// Kill ends Envoy as kill -9 does.
func (e *Envoy) Kill() error {
	e.client.CloseIdleConnections()
	return e.process.Kill()
}

// poll tries until it succeeds, Envoy ends, or half a minute is over.
func (e *Envoy) poll(ctx context.Context, what string, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w; last: %w; its log:\n%s", what, context.Cause(ctx), err, e.process.LogTail(20))
		case <-e.process.Done():
			return e.process.Exited()
		case <-tick.C:
		}
	}
}

func (e *Envoy) get(ctx context.Context, path string) ([]byte, error) {
	target, err := url.Parse(e.admin + path)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: Envoy answered %d: %s", path, resp.StatusCode, strings.TrimSpace(string(body)))
	}
	return body, nil
}
