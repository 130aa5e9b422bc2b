package relays

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/meshca/meshca/test/bench/rig"
	"github.com/meshca/meshca/test/bench/table"
	"github.com/meshca/meshca/test/testenv"
)

// relay is a program that stands before a backend, and how it is told to.
type relay struct {
	name string // in the table
	file string // what its files' names begin with
	host string // where all its processes listen
	// command writes what a process reads, and returns what to run.
	command func(site) ([]string, error)
}

// site is one process' place.
type site struct {
	name            string // of its files
	listen, backend string
	ops             string // where to serve profiles; nowhere if empty
}

// names of relays in the table.
const (
	ours, bare, envoy, haproxy, nginx = "meshca", "bare relay in Go", "Envoy", "HAProxy", "nginx"
	direct                            = "no proxy"
)

// threads is how many threads, or workers, each relay has.
const threads = 2

// peers finds the relays that are there, and notes their versions, or that one is
// missing. Each may have so many connections.
func peers(ctx context.Context, r *rig.Run, m *mesh, p *table.Part, connections int) ([]*relay, error) {
	proxy, err := r.Program(ctx, "./cmd/proxy")
	if err != nil {
		return nil, err
	}
	plain, err := testenv.Build(ctx, r.Dir, filepath.Join("test", "bench"), "./relays/bare")
	if err != nil {
		return nil, err
	}
	binary, err := testenv.Envoy(ctx, r.Cache)
	if err != nil {
		return nil, err
	}
	p.Versions["Envoy"] = testenv.EnvoyVersion
	install(ctx, r)
	c := configurations{run: r, mesh: m, connections: connections}
	found := []*relay{
		{ours, "proxy", "127.0.0.2", func(s site) ([]string, error) {
			most := fmt.Sprint(connections)
			command := []string{"env", fmt.Sprint("GOMAXPROCS=", threads), proxy, "--socket", m.socket, "--mode", "STRICT", "--inbound", s.listen + "=" + s.backend,
				"--max-connections", most, "--max-handshakes-per-source", most, "--drain-time", "1s"}
			if s.ops != "" {
				command = append(append(command, "--ops-listen", s.ops), rig.Profiled()...)
			}
			return command, nil
		}},
		{bare, "bare", "127.0.0.3", func(s site) ([]string, error) {
			return []string{"env", fmt.Sprint("GOMAXPROCS=", threads), plain, "-listen", s.listen, "-backend", s.backend, "-chain", m.chain, "-key", m.key, "-root", m.root, "-pprof", s.ops}, nil
		}},
		{envoy, "envoy", "127.0.0.4", func(s site) ([]string, error) {
			file, err := c.envoy(s)
			return []string{binary, "--config-path", file, "--disable-hot-restart", "--concurrency", fmt.Sprint(threads), "--log-level", "warning"}, err
		}},
	}
	if path, version, err := c.find(ctx, "haproxy", "-vv", `HAProxy version (\S+)`); err != nil {
		p.Method += fmt.Sprintf("\nHAProxy was left out: %v.", err)
	} else {
		p.Versions["HAProxy"] = version
		if _, openssl, err := c.find(ctx, "haproxy", "-vv", `Running on OpenSSL version : OpenSSL (\S+)`); err == nil {
			p.Versions["OpenSSL"] = openssl
		}
		found = append(found, &relay{haproxy, "haproxy", "127.0.0.5", func(s site) ([]string, error) {
			file, err := c.haproxy(s)
			return []string{"env", "OPENSSL_CONF=" + c.openssl(), path, "-db", "-f", file}, err
		}})
	}
	if path, version, modules, err := c.findNginx(ctx); err != nil {
		p.Method += fmt.Sprintf("\nnginx was left out: %v.", err)
	} else {
		p.Versions["nginx"] = version
		found = append(found, &relay{nginx, "nginx", "127.0.0.6", func(s site) ([]string, error) {
			file, err := c.nginx(s, modules)
			return []string{path, "-e", file + ".log", "-c", file}, err
		}})
	}
	return found, nil
}

// packages are Debian's, by the file that shows that one is there.
var packages = map[string]string{
	"/usr/sbin/haproxy": "haproxy", "/usr/sbin/nginx": "nginx", "/usr/lib/nginx/modules/ngx_stream_module.so": "libnginx-mod-stream",
}

// install tries to get what is missing; what is missing afterwards is left out.
func install(ctx context.Context, r *rig.Run) {
	var missing []string
	for file, name := range packages {
		if _, err := os.Stat(file); err != nil {
			missing = append(missing, name)
		}
	}
	if len(missing) == 0 {
		return
	}
	if _, err := exec.LookPath("apt-get"); err != nil || os.Getuid() != 0 {
		return
	}
	r.Say("installing %s", strings.Join(missing, ", "))
	for _, args := range [][]string{{"update"}, append([]string{"-y", "--no-install-recommends", "install"}, missing...)} {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-qq"}, args...)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			r.Say("it could not be installed: %v\n%s", err, bytes.TrimSpace(out))
			return
		}
	}
}

// configurations writes those of other people's relays.
type configurations struct {
	run         *rig.Run
	mesh        *mesh
	connections int
}

// find looks for a program, and for what it says of itself.
func (c configurations) find(ctx context.Context, name, flag, pattern string) (path, said string, err error) {
	if path, err = exec.LookPath(name); err != nil {
		path = "/usr/sbin/" + name // where not every user looks
	}
	out, err := exec.CommandContext(ctx, path, flag).CombinedOutput()
	if err != nil {
		return "", "", fmt.Errorf("asking %s for its version: %w; install Debian's package of that name", name, err)
	}
	match := regexp.MustCompile(pattern).FindSubmatch(out)
	if match == nil {
		return "", "", fmt.Errorf("%s says nothing that matches %q", name, pattern)
	}
	return path, string(match[1]), nil
}

func (c configurations) findNginx(ctx context.Context) (path, version, module string, err error) {
	if path, version, err = c.find(ctx, "nginx", "-V", `nginx version: nginx/(\S+)`); err != nil {
		return "", "", "", err
	}
	_, modules, err := c.find(ctx, "nginx", "-V", `--modules-path=(\S+)`)
	if err != nil {
		return "", "", "", err
	}
	module = filepath.Join(modules, "ngx_stream_module.so")
	if _, err := os.Stat(module); err != nil {
		return "", "", "", fmt.Errorf("looking for its stream module: %w; install Debian's libnginx-mod-stream", err)
	}
	return path, version, module, nil
}

func (c configurations) envoy(s site) (file string, err error) {
	host, port, err := net.SplitHostPort(s.listen)
	if err != nil {
		return "", err
	}
	appHost, appPort, err := net.SplitHostPort(s.backend)
	if err != nil {
		return "", err
	}
	return c.run.Write(s.name+".yaml", fmt.Appendf(nil, `
node: {id: bench, cluster: bench}
static_resources:
  listeners:
  - name: inbound
    address: {socket_address: {address: %s, port_value: %s}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          disable_stateless_session_resumption: true
          disable_stateful_session_resumption: true
          common_tls_context:
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3, ecdh_curves: [X25519]}
            tls_certificates: [{certificate_chain: {filename: %q}, private_key: {filename: %q}}]
            validation_context: {trusted_ca: {filename: %q}}
      filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: inbound
          cluster: app
  clusters:
  - name: app
    connect_timeout: 5s
    circuit_breakers: {thresholds: [{max_connections: %d, max_pending_requests: %d}]}
    load_assignment:
      cluster_name: app
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: %s, port_value: %s}}}}]}]
`, host, port, c.mesh.chain, c.mesh.key, c.mesh.root, c.connections, c.connections, appHost, appPort))
}

func (c configurations) haproxy(s site) (file string, err error) {
	// Its no-tls-tickets still has OpenSSL give tickets of TLS 1.3, for nothing.
	if _, err := c.run.Write("openssl.cnf", []byte(`
openssl_conf = all
[all]
ssl_conf = contexts
[contexts]
system_default = context
[context]
NumTickets = 0
`)); err != nil {
		return "", err
	}
	return c.run.Write(s.name+".cfg", fmt.Appendf(nil, `
global
    nbthread %d
    maxconn %d
    tune.ssl.cachesize 0
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen inbound
    bind %s ssl crt %s ca-file %s verify required ssl-min-ver TLSv1.3 ssl-max-ver TLSv1.3 curves X25519 ciphersuites TLS_AES_128_GCM_SHA256 no-tls-tickets
    server app %s
`, threads, c.connections, s.listen, c.mesh.chain, c.mesh.root, s.backend))
}

func (c configurations) openssl() string { return filepath.Join(c.run.Dir, "openssl.cnf") }

// nginx's workers may get any share of the connections, and count both halves.
func (c configurations) nginx(s site, module string) (file string, err error) {
	return c.run.Write(s.name+".conf", fmt.Appendf(nil, `
load_module %q;
daemon off;
worker_processes %d;
pid %q;
events { worker_connections %d; }
stream {
    access_log off;
    server {
        listen %s ssl backlog=4096;
        ssl_protocols TLSv1.3;
        ssl_ecdh_curve X25519;
        ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
        ssl_session_cache off;
        ssl_session_tickets off;
        ssl_conf_command NumTickets 0;
        ssl_certificate %q;
        ssl_certificate_key %q;
        ssl_client_certificate %q;
        ssl_verify_client on;
        ssl_verify_depth 3;
        proxy_timeout 1h;
        proxy_pass %s;
    }
}
`, module, threads, filepath.Join(c.run.Dir, s.name+".pid"), 2*c.connections+100, s.listen, c.mesh.chain, c.mesh.key, c.mesh.root, s.backend))
}
