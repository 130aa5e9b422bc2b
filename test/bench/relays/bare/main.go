// Command bare is the least that a relay in Go needs: crypto/tls, which wants the
// client's certificate, and io.Copy both ways. It is what our proxy is measured
// beside; it has no limits, no policy and no order in which it ends.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	_ "net/http/pprof" // on -pprof
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "bare:", run(os.Args[1:])) // which ends by failing only
	os.Exit(1)
}

func run(args []string) error {
	flags := flag.NewFlagSet("bare", flag.ContinueOnError)
	listen := flags.String("listen", "", "where to listen for TLS")
	backend := flags.String("backend", "", "where to carry what is inside")
	chain := flags.String("chain", "", "the certificate's file, with its intermediates")
	key := flags.String("key", "", "its key's file")
	root := flags.String("root", "", "the file with whom clients' certificates must chain to")
	profiles := flags.String("pprof", "", "where to serve profiles; nowhere if empty")
	if err := flags.Parse(args); err != nil {
		return err
	}
	conf, err := configuration(*chain, *key, *root)
	if err != nil {
		return err
	}
	if *profiles != "" {
		go func() { fmt.Fprintln(os.Stderr, "bare:", http.ListenAndServe(*profiles, nil)) }()
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go relay(tls.Server(conn, conf), *backend)
	}
}

func configuration(chain, key, root string) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(chain, key)
	if err != nil {
		return nil, err
	}
	anchor, err := os.ReadFile(root)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(anchor) {
		return nil, errors.New("the file of -root holds no certificate")
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519},
		Certificates: []tls.Certificate{cert}, SessionTicketsDisabled: true,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots,
	}, nil
}

// relay drops a connection that fails; whoever measures sees that it did.
func relay(client *tls.Conn, backend string) {
	defer client.Close()
	if err := client.Handshake(); err != nil {
		return
	}
	conn, err := net.Dial("tcp", backend)
	if err != nil {
		return
	}
	defer conn.Close()
	app := conn.(*net.TCPConn)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(app, client)
		_ = app.CloseWrite()
	}()
	_, _ = io.Copy(client, app)
	_ = client.CloseWrite()
	<-done
}
