package demo

import "fmt"

// invitation is what --stay prints: commands to paste into another terminal.
func (w *world) invitation(front, cart *workload, app *cart) string {
	return fmt.Sprintf(`Everything is up until you press ctrl-c. In another terminal:

  the CA's certificate, verified against the trust anchor
    openssl s_client -connect %[1]s -CAfile %[2]s -verify_return_error -brief </dev/null

  cart asks for a certificate, so curl alone is refused
    curl -k https://%[3]s/

  what frontend's agent serves to whoever can connect (ask for "default", and you are frontend)
    grpcurl -plaintext -unix %[4]s list
    grpcurl -plaintext -unix -H 'workload.spiffe.io: true' %[4]s SpiffeWorkloadAPI/FetchX509Bundles
    grpcurl -plaintext -unix -d '{"resource_names": ["ROOTCA"]}' %[4]s \
      envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets

  any SPIFFE program becomes cart with
    export SPIFFE_ENDPOINT_SOCKET=unix://%[5]s

  who asked the CA for what
    tail -f %[6]s

`, w.addr, w.anchor, app.addr, front.socket, cart.socket, w.auditLog)
}
