package demo

import "fmt"

// invitation is what --stay prints: commands to paste into another terminal.
func (w *world) invitation(front, cart *workload, app *cart, behind *shop) string {
	return fmt.Sprintf(`Everything is up until you press ctrl-c. In another terminal:

  the CA's certificate, verified against the trust anchor
    openssl s_client -connect %[1]s -CAfile %[2]s -verify_return_error -brief </dev/null

  cart asks for a certificate, so curl alone is refused
    curl -k https://%[3]s/

  plaintext to the program behind the proxy, which STRICT refuses, and to its exempted port
    curl http://%[7]s/
    curl http://%[8]s/

  change the policy, and try again (what it will mean: meshca policy resolve)
    sed -i s/STRICT/PERMISSIVE/ %[9]s

  what frontend's agent serves to whoever can connect (ask for "default", and you are frontend)
    grpcurl -plaintext -unix %[4]s list
    grpcurl -plaintext -unix -H 'workload.spiffe.io: true' %[4]s SpiffeWorkloadAPI/FetchX509Bundles
    grpcurl -plaintext -unix -d '{"resource_names": ["ROOTCA"]}' %[4]s \
      envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets

  any SPIFFE program becomes cart with
    export SPIFFE_ENDPOINT_SOCKET=unix://%[5]s

  who asked the CA for what
    tail -f %[6]s

`, w.addr, w.anchor, app.addr, front.socket, cart.socket, w.auditLog, behind.addresses[0], behind.addresses[1], behind.policyFile("default"))
}
