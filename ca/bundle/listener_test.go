package bundle

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

// One client opens as many connections as it can and says nothing. It gets its share,
// and another address is served.
func TestOneAddressDoesNotHoldAllPlaces(t *testing.T) {
	files := newWebFiles(t)
	pool := files.write(t)
	s := &source{}
	s.set(newBundle(t, 1, 1))
	url := serve(t, Config{Source: s.get, CertFile: files.cert, KeyFile: files.key})
	_, port, err := net.SplitHostPort(strings.TrimSuffix(strings.TrimPrefix(url, "https://"), "/"))
	check(t, err)
	greedy := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	var held []net.Conn
	for range maxPerSource {
		c, err := greedy.Dial("tcp", net.JoinHostPort("127.0.0.1", port))
		check(t, err)
		defer c.Close()
		held = append(held, c)
	}
	beyond, err := greedy.Dial("tcp", net.JoinHostPort("127.0.0.1", port))
	check(t, err)
	defer beyond.Close()
	check(t, beyond.SetReadDeadline(time.Now().Add(headerTimeout/2))) // before a slow one is closed
	if _, err := beyond.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection beyond the share stays open: %v", err)
	}
	get := func() error {
		c := client(t, pool, nil)
		c.Timeout = 5 * time.Second
		resp, err := c.Get(url)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return errors.Join(err, resp.Body.Close())
	}
	if err := get(); err != nil {
		t.Errorf("from another address: %v", err)
	}
	for _, c := range held {
		check(t, c.Close())
	}
}

func TestPlacesAreGivenBack(t *testing.T) {
	f := newFair(nil)
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	for range maxPerSource {
		if !f.enter(a) {
			t.Fatal("the share is smaller than it is")
		}
	}
	if f.enter(a) || !f.enter(b) {
		t.Error("one address has more than its share, or another one none")
	}
	f.leave(a)
	if !f.enter(a) {
		t.Error("a place that was given back is not to be had")
	}
	for range maxPerSource {
		f.leave(a)
	}
	f.leave(b)
	if len(f.open) != 0 {
		t.Errorf("addresses are remembered for nothing: %v", f.open)
	}
	for address, want := range map[string]string{
		"192.0.2.1:1": "192.0.2.1", "[::ffff:192.0.2.1]:1": "192.0.2.1", "[2001:db8::1]:1": "2001:db8::", "[2001:db8:0:0:9::1]:1": "2001:db8::", "[fe80::1%eth0]:1": "fe80::",
	} {
		if got := sourceOf(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))); got.String() != want {
			t.Errorf("%s counts as %s", address, got)
		}
	}
}
