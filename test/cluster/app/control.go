package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// control does as it is told, each time anew: no connection and no SVID is kept
// from one call to the next, unless that is what the call is for.
func control() *http.Server {
	mux := http.NewServeMux()
	handle := func(pattern string, do func(context.Context, func(string) string) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			within := 10 * time.Second
			if ms, err := strconv.Atoi(r.FormValue("ms")); err == nil {
				within = time.Duration(ms) * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(r.Context(), within)
			defer cancel()
			out, err := do(ctx, r.FormValue)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			_ = json.NewEncoder(w).Encode(out)
		})
	}
	handle("/svid", svid)
	handle("/first", waited)
	handle("/get", get)
	handle("/hold", hold)
	handle("/file", file)
	return server(":9000", mux)
}

// SVID is what the Workload API gave.
type SVID struct {
	ID     string
	Serial string

	Roots [][]byte
	Ends  time.Time
	Took  time.Duration
}

// svid asks the Workload API, at socket=... or where the environment says.
func svid(ctx context.Context, arg func(string) string) (any, error) {
	began := time.Now()
	var options []workloadapi.ClientOption
	if s := arg("socket"); s != "" {
		options = append(options, workloadapi.WithAddr("unix://"+s))
	}
	client, err := workloadapi.New(ctx, options...)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	got, err := client.FetchX509Context(ctx)
	if err != nil {
		return nil, err
	}
	one := got.DefaultSVID()
	out := SVID{ID: one.ID.String(), Serial: one.Certificates[0].SerialNumber.Text(16), Ends: one.Certificates[0].NotAfter, Took: time.Since(began)}
	bundle, err := got.Bundles.GetX509BundleForTrustDomain(one.ID.TrustDomain())
	if err != nil {
		return nil, err
	}
	for _, c := range bundle.X509Authorities() {
		out.Roots = append(out.Roots, c.Raw)
	}
	return out, verify(one.Certificates, bundle.X509Authorities())
}

// waited tells how long the program waited for its first SVID.
func waited(context.Context, func(string) string) (any, error) {
	if took := first.Load(); took > 0 {
		return SVID{Took: time.Duration(took)}, nil
	}
	return nil, errors.New("there is no SVID yet")
}

// verify is crypto/x509's own judgement of what came.
func verify(chain, roots []*x509.Certificate) error {
	options := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, c := range roots {
		options.Roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		options.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(options)
	return err
}

// get fetches url=..., with mutual TLS to id=... if that is given.
func get(ctx context.Context, arg func(string) string) (any, error) {
	transport := &http.Transport{DisableKeepAlives: true}
	if want := arg("id"); want != "" {
		id, err := spiffeid.FromString(want)
		if err != nil {
			return nil, err
		}
		source, err := workloadapi.NewX509Source(ctx)
		if err != nil {
			return nil, err
		}
		defer source.Close()
		transport.TLSClientConfig = tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id))
		if arg("alpn") != "" {
			transport.TLSClientConfig.NextProtos = []string{arg("alpn")}
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, arg("url"), nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return string(body), err
}

// hold opens a plaintext connection to addr=..., asks on it again and again, and
// says when that stopped to work.
func hold(ctx context.Context, arg func(string) string) (any, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", arg("addr"))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	answers := 0
	buf := make([]byte, 4096)
	for {
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: held\r\n\r\n"); err != nil {
			return held{answers, time.Now(), err.Error()}, nil
		}
		if _, err := conn.Read(buf); err != nil {
			return held{answers, time.Now(), err.Error()}, nil
		}
		answers++
		select {
		case <-ctx.Done():
			return nil, errors.New("it was still open")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

type held struct {
	Answers int
	Ended   time.Time
	Reason  string
}

// file tries op=... on paths that a pod has no business with.
func file(_ context.Context, arg func(string) string) (any, error) {
	from, to := arg("from"), arg("to")
	switch arg("op") {
	case "symlink":
		return "made", os.Symlink(from, to)
	case "link":
		return "made", os.Link(from, to)
	case "rename":
		return "made", os.Rename(from, to)
	case "write":
		return "made", os.WriteFile(to, []byte("x"), 0o600)
	case "remove":
		return "removed", os.Remove(to)
	case "read":
		content, err := os.ReadFile(from)
		return string(content), err
	case "list":
		var found []string
		err := filepath.WalkDir(from, func(path string, _ os.DirEntry, err error) error {
			if err == nil {
				found = append(found, path)
			}
			return nil
		})
		return found, err
	}
	return nil, fmt.Errorf("unknown op %q", arg("op"))
}
