package mesh

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/smtp"
	"os"
	"strings"
	"testing"
	"time"
)

// late waits before its first write, and then writes byte by byte, each in a packet
// of its own.
type late struct {
	net.Conn
	wait  time.Duration
	begun bool
}

func (c *late) Write(p []byte) (int, error) {
	if !c.begun {
		c.begun = true
		<-time.After(c.wait)
	}
	for i := range p {
		if _, err := c.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

// A client whose hello comes 300 ms late, after detection has given up on it, and
// one byte a packet, at the timings that the program has by default: mutual TLS is
// terminated all the same, and a late plaintext client under PERMISSIVE is served.
func TestV25_LateHelloInPieces(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 0)
	ca := m.startCA(t)
	cart := m.workload(t, "cart").startReadyAgent(t, ca)
	peer := m.workload(t, "frontend").startReadyAgent(t, ca).peerConfig(t)
	addresses := cart.startModes(t, backend(t), backend(t), backend(t))
	for _, wait := range []time.Duration{0, 300 * time.Millisecond} {
		for _, tt := range []struct {
			mode   string
			mesh   bool
			passes bool
		}{
			{"STRICT", true, true}, {"STRICT", false, false},
			{"PERMISSIVE", true, true}, {"PERMISSIVE", false, true},
			{"DISABLE", true, false}, {"DISABLE", false, true},
		} {
			raw, err := net.Dial("tcp", addresses[tt.mode])
			if err != nil {
				t.Fatal(err)
			}
			var conn net.Conn = &late{Conn: raw, wait: wait}
			if tt.mesh {
				conn = tls.Client(conn, peer)
			}
			if err := keepAlive(conn); (err == nil) != tt.passes || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s, mesh %v, %v late: %v; want it to pass: %v", tt.mode, tt.mesh, wait, err, tt.passes)
			}
			_ = raw.Close()
		}
	}
}

// speaksFirst is an app that greets each client, and tells of it.
func speaksFirst(t testing.TB, greeting string, serve func(net.Conn)) (address string, greeted <-chan struct{}) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan struct{}, 16)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			told <- struct{}{}
			go func() {
				defer conn.Close()
				if _, err := io.WriteString(conn, greeting); err == nil {
					serve(conn)
				}
			}()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String(), told
}

// serveSMTP answers as much of SMTP as a client needs to say hello and goodbye.
func serveSMTP(c net.Conn) {
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		switch verb, _, _ := strings.Cut(strings.ToUpper(lines.Text()), " "); verb {
		case "EHLO", "HELO", "NOOP":
			fmt.Fprint(c, "250 mail.shop\r\n")
		case "QUIT":
			fmt.Fprint(c, "221 bye\r\n")
			return
		default:
			fmt.Fprint(c, "502 not here\r\n")
		}
	}
}

// handshakeV10 is how a MySQL server begins: a packet of protocol 10 with its
// version, a connection's number and a nonce.
const handshakeV10 = "\x2a\x00\x00\x00\x0a8.4.2-meshca\x00\x01\x00\x00\x00noncenon\x00\xff\xf7\xff\x02\x00\xff\xdf\x15\x00"

// Apps that speak first: a client that says nothing is given their greeting at the
// default timings, in plaintext where that may be, and inside mutual TLS under
// STRICT, which an app never notices a silent plaintext client of.
func TestV25_AppsThatSpeakFirst(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 0)
	ca := m.startCA(t)
	cart := m.workload(t, "cart").startReadyAgent(t, ca)
	peer := m.workload(t, "frontend").startReadyAgent(t, ca).peerConfig(t)

	var mail, database []string
	var mailHeard, databaseHeard []<-chan struct{}
	for range modes {
		address, heard := speaksFirst(t, "220 mail.shop ESMTP\r\n", serveSMTP)
		mail, mailHeard = append(mail, address), append(mailHeard, heard)
		address, heard = speaksFirst(t, handshakeV10, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
		database, databaseHeard = append(database, address), append(databaseHeard, heard)
	}
	mails, databases := cart.startModes(t, mail...), cart.startModes(t, database...)

	sayHello := func(conn net.Conn) error {
		_ = conn.SetDeadline(time.Now().Add(patience))
		c, err := smtp.NewClient(conn, "mail.shop")
		if err != nil {
			return err
		}
		defer c.Close()
		return errors.Join(c.Hello("cart"), c.Noop(), c.Quit())
	}
	readHandshake := func(conn net.Conn) error {
		_ = conn.SetDeadline(time.Now().Add(patience))
		got := make([]byte, len(handshakeV10))
		if _, err := io.ReadFull(conn, got); err != nil {
			return err
		}
		if string(got) != handshakeV10 {
			return fmt.Errorf("the greeting came as %q", got)
		}
		return nil
	}
	for i, mode := range modes {
		for _, app := range []struct {
			name    string
			address string
			heard   <-chan struct{}
			talk    func(net.Conn) error
		}{{"SMTP", mails[mode], mailHeard[i], sayHello}, {"MySQL", databases[mode], databaseHeard[i], readHandshake}} {
			plain, err := net.Dial("tcp", app.address)
			if err != nil {
				t.Fatal(err)
			}
			err = app.talk(plain)
			_ = plain.Close()
			if refused := mode == "STRICT"; (err != nil) != refused || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s in plaintext under %s: %v", app.name, mode, err)
			}
			if mode == "DISABLE" {
				continue // nobody terminates TLS there
			}
			if mode == "STRICT" && len(app.heard) != 0 {
				t.Errorf("under STRICT %s heard of a plaintext client", app.name)
			}
			raw, err := net.Dial("tcp", app.address)
			if err != nil {
				t.Fatal(err)
			}
			if err := app.talk(tls.Client(raw, peer)); err != nil {
				t.Errorf("%s in mutual TLS under %s: %v", app.name, mode, err)
			}
			_ = raw.Close()
		}
	}
}
