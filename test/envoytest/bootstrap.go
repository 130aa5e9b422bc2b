package envoytest

import (
	"encoding/json"
	"fmt"
	"net"
	"strconv"
)

// SDSType is how Envoy asks for secrets.
type SDSType string

// The two ways of asking.
const (
	StateOfTheWorld SDSType = "GRPC"
	Delta           SDSType = "DELTA_GRPC"
)

// Bootstrap describes an Envoy. All listeners are on loopback, on ports that
// the kernel picks.
type Bootstrap struct {
	NodeID  string
	Socket  string // path of the Unix socket that serves SDS
	SDS     SDSType
	Servers []Server
	Clients []Client
}

// TLS names the secrets of one side of mutual TLS.
type TLS struct {
	Certificate string // name of a tls_certificate secret
	Validation  string // name of a validation_context secret
	// PeerIDs are the SPIFFE IDs that the peer may have; any that the
	// validation context accepts if there are none. Where there are some, the
	// rule stands in the listener's own configuration and the secret is
	// combined with it.
	PeerIDs []string
}

// Server is a listener that demands mTLS of its clients and passes the
// plaintext on.
type Server struct {
	Name     string
	Upstream string // host:port of a plaintext TCP server
	TLS
}

// Client is a plaintext listener that passes what it gets on over mTLS.
type Client struct {
	Name     string
	Upstream string // host:port of an mTLS server
	ALPN     []string
	TLS
}

type object map[string]any

// encode renders the bootstrap as JSON, built from values rather than text, so
// that no name can break out of its place.
func (b Bootstrap) encode() ([]byte, error) {
	listeners, clusters := []object{}, []object{b.sdsCluster()}
	for _, s := range b.Servers {
		cluster, err := staticCluster(s.Name, s.Upstream)
		if err != nil {
			return nil, err
		}
		listener := tcpListener(s.Name)
		listener["filter_chains"].([]object)[0]["transport_socket"] = transportSocket("DownstreamTlsContext", object{
			"require_client_certificate":           true,
			"disable_stateless_session_resumption": true,
			"common_tls_context":                   b.commonTLS(s.TLS, nil),
		})
		listeners, clusters = append(listeners, listener), append(clusters, cluster)
	}
	for _, c := range b.Clients {
		cluster, err := staticCluster(c.Name, c.Upstream)
		if err != nil {
			return nil, err
		}
		cluster["transport_socket"] = transportSocket("UpstreamTlsContext", object{
			"max_session_keys":   0, // no resumption: each connection shows today's certificate
			"common_tls_context": b.commonTLS(c.TLS, c.ALPN),
		})
		listeners, clusters = append(listeners, tcpListener(c.Name)), append(clusters, cluster)
	}
	return json.Marshal(object{
		"node":  object{"id": b.NodeID, "cluster": "envoytest"},
		"admin": object{"address": socketAddress("127.0.0.1", 0)},
		"static_resources": object{
			"listeners": listeners,
			"clusters":  clusters,
		},
	})
}

// sdsCluster is named so that it collides with nothing of a test's.
const sdsClusterName = "envoytest-sds"

func (b Bootstrap) sdsCluster() object {
	return object{
		"name":            sdsClusterName,
		"type":            "STATIC",
		"connect_timeout": "1s",
		"typed_extension_protocol_options": object{
			"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
				"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
				"explicit_http_config": object{"http2_protocol_options": object{}},
			},
		},
		"load_assignment": loadAssignment(sdsClusterName, object{"pipe": object{"path": b.Socket}}),
	}
}

func (b Bootstrap) commonTLS(t TLS, alpn []string) object {
	tls := object{
		"tls_params": object{
			// Envoy's clients stop at TLS 1.2 unless they are told otherwise.
			"tls_minimum_protocol_version": "TLSv1_3",
			"tls_maximum_protocol_version": "TLSv1_3",
		},
		"tls_certificate_sds_secret_configs": []object{b.secret(t.Certificate)},
	}
	if len(alpn) > 0 {
		tls["alpn_protocols"] = alpn
	}
	if len(t.PeerIDs) == 0 {
		tls["validation_context_sds_secret_config"] = b.secret(t.Validation)
		return tls
	}
	matchers := []object{}
	for _, id := range t.PeerIDs {
		matchers = append(matchers, object{"san_type": "URI", "matcher": object{"exact": id}})
	}
	tls["combined_validation_context"] = object{
		"default_validation_context":           object{"match_typed_subject_alt_names": matchers},
		"validation_context_sds_secret_config": b.secret(t.Validation),
	}
	return tls
}

func (b Bootstrap) secret(name string) object {
	return object{
		"name": name,
		"sds_config": object{
			"resource_api_version": "V3",
			// A listener waits for its secrets as long as it takes, so that a
			// test never races Envoy's own fifteen seconds.
			"initial_fetch_timeout": "0s",
			"api_config_source": object{
				"api_type":              string(b.SDS),
				"transport_api_version": "V3",
				"grpc_services":         []object{{"envoy_grpc": object{"cluster_name": sdsClusterName}}},
			},
		},
	}
}

func tcpListener(name string) object {
	return object{
		"name":        name,
		"stat_prefix": name, // the address, by default, which is the same port 0 for all
		"address":     socketAddress("127.0.0.1", 0),
		"filter_chains": []object{{
			"filters": []object{{
				"name": "envoy.filters.network.tcp_proxy",
				"typed_config": object{
					"@type":       "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
					"stat_prefix": name,
					"cluster":     name,
				},
			}},
		}},
	}
}

func transportSocket(kind string, context object) object {
	context["@type"] = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3." + kind
	return object{"name": "envoy.transport_sockets.tls", "typed_config": context}
}

func staticCluster(name, upstream string) (object, error) {
	host, port, err := net.SplitHostPort(upstream)
	if err != nil {
		return nil, fmt.Errorf("upstream of %q: %w", name, err)
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("upstream of %q: %w", name, err)
	}
	return object{
		"name":            name,
		"type":            "STATIC",
		"connect_timeout": "5s",
		"load_assignment": loadAssignment(name, socketAddress(host, number)),
	}, nil
}

func loadAssignment(cluster string, address object) object {
	return object{
		"cluster_name": cluster,
		"endpoints":    []object{{"lb_endpoints": []object{{"endpoint": object{"address": address}}}}},
	}
}

func socketAddress(host string, port uint64) object {
	return object{"socket_address": object{"address": host, "port_value": port}}
}
