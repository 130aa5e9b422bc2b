package proxy

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"io"
	"math/big"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshca/meshca/identity/identitytest"
)

// cpuTime is what this process has used up.
func cpuTime(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// cheaply wants f to take less of a processor than most. The other end's work is
// in it: the clients of these tests are in the same process.
func cheaply(t testing.TB, most time.Duration, f func()) {
	t.Helper()
	before := cpuTime(t)
	f()
	used := cpuTime(t) - before
	t.Logf("%v of a processor", used)
	if used > most {
		t.Errorf("it took %v of a processor, at most %v are allowed", used, most)
	}
}

// A Certificate message of 10 MiB ends the connection long before all of it was
// read.
func TestV61_CertificateMessageOf10MiB(t *testing.T) {
	monster := func(k *kit, id string) *tls.Config {
		conf := k.meshConfig(id, "istio")
		conf.Certificates[0].Certificate = append(conf.Certificates[0].Certificate, make([]byte, 10<<20))
		return conf
	}
	t.Run("from a client", func(t *testing.T) {
		k := start(t)
		conf := monster(k, frontendID)
		cheaply(t, time.Second, func() {
			if err := tls.Client(k.dial(), conf).Handshake(); err == nil {
				t.Error("all of it was taken")
			}
			k.next(map[string]any{"end": "handshake failed", "security": "none"})
		})
		k.app.untouched(t)
		echoes(t, k.dialTLS(k.meshConfig(frontendID, "istio")), "hello")
	})
	t.Run("from a target", func(t *testing.T) {
		taken := make(chan error, 1)
		show := make(chan *tls.Config, 1)
		target := newApp(t, func(c *net.TCPConn) {
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			taken <- tls.Server(c, <-show).Handshake()
		})
		k := start(t, withOutbound(target.address, frontendID))
		conf := monster(k, frontendID)
		conf.ClientAuth = tls.RequireAnyClientCert
		show <- conf
		cheaply(t, time.Second, func() {
			isLost(t, k.out, "")
			k.next(map[string]any{"direction": "outbound", "end": "handshake failed", "security": "none"})
		})
		if err := <-taken; err == nil {
			t.Error("all of it was taken")
		}
	})
}

// recordWriter writes records of TLS 1.3 on a connection whose handshake
// crypto/tls has made, since crypto/tls does not let its user send what it likes.
type recordWriter struct {
	conn   net.Conn
	secret []byte
	seal   cipher.AEAD
	iv     []byte
	number uint64
}

// clientWriter takes over the client's half; nothing may have been written since
// the handshake. keys is what the handshake logged.
func clientWriter(t testing.TB, conn *tls.Conn, keys string) *recordWriter {
	t.Helper()
	if suite := conn.ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Skipf("this processor prefers %s", tls.CipherSuiteName(suite))
	}
	for line := range strings.Lines(keys) {
		if fields := strings.Fields(line); fields[0] == "CLIENT_TRAFFIC_SECRET_0" {
			secret, err := hex.DecodeString(fields[2])
			if err != nil {
				t.Fatal(err)
			}
			w := &recordWriter{conn: conn.NetConn()}
			w.rekey(t, secret)
			return w
		}
	}
	t.Fatal("the handshake logged no secret")
	return nil
}

// expand is HKDF-Expand-Label with an empty context (RFC 8446 §7.1).
func expand(t testing.TB, secret []byte, label string, n int) []byte {
	t.Helper()
	label = "tls13 " + label
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(append(append(info, byte(len(label))), label...), 0)
	out, err := hkdf.Expand(sha256.New, secret, string(info), n)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (w *recordWriter) rekey(t testing.TB, secret []byte) {
	t.Helper()
	block, err := aes.NewCipher(expand(t, secret, "key", 16))
	if err != nil {
		t.Fatal(err)
	}
	if w.seal, err = cipher.NewGCM(block); err != nil {
		t.Fatal(err)
	}
	w.secret, w.iv, w.number = secret, expand(t, secret, "iv", 12), 0
}

const (
	recordAlert = 21
	recordData  = 23
)

func (w *recordWriter) write(kind byte, content []byte) error {
	inner := append(bytes.Clone(content), kind)
	record := []byte{recordData, 3, 3}
	record = binary.BigEndian.AppendUint16(record, uint16(len(inner)+w.seal.Overhead()))
	nonce := bytes.Clone(w.iv)
	for i := range 8 {
		nonce[4+i] ^= byte(w.number >> (56 - 8*i))
	}
	w.number++
	_, err := w.conn.Write(w.seal.Seal(record, nonce, inner, record))
	return err
}

// A client that changes its keys without end is sent away, whether it wants the
// same of us or not. So is one that sends records with nothing in them.
func TestV61_KeyUpdateLoop(t *testing.T) {
	update := func(request byte) func(testing.TB, *recordWriter) error {
		return func(t testing.TB, w *recordWriter) error {
			err := w.write(recordHandshake, []byte{24, 0, 0, 1, request})
			w.rekey(t, expand(t, w.secret, "traffic upd", 32))
			return err
		}
	}
	for name, send := range map[string]func(testing.TB, *recordWriter) error{
		"key updates":           update(0),
		"requested key updates": update(1),
		"empty records":         func(_ testing.TB, w *recordWriter) error { return w.write(recordData, nil) },
		"warnings":              func(_ testing.TB, w *recordWriter) error { return w.write(recordAlert, []byte{1, 90}) }, // user_canceled
	} {
		t.Run(name, func(t *testing.T) {
			k := start(t)
			var keys strings.Builder
			conf := k.meshConfig(frontendID, "istio")
			conf.KeyLogWriter = &keys
			conn := k.dialTLS(conf)
			w := clientWriter(t, conn, keys.String())
			if err := w.write(recordData, []byte("hello")); err != nil { // these are the right keys
				t.Fatal(err)
			}
			if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
			cheaply(t, time.Second, func() {
				const most = 100_000
				sent := 0
				for ; sent < most && send(t, w) == nil; sent++ {
				}
				if sent == most {
					t.Error("it goes on and on")
				}
				k.next(map[string]any{"end": "reset", "bytes_to_app": 5.0})
			})
		})
	}
}

// withKey is a certificate as the authority might have signed it, for another key
// than crypto/x509 would let it.
func withKey(t testing.TB, ca *identitytest.CA, of *x509.Certificate, spki []byte) []byte {
	t.Helper()
	var fields []asn1.RawValue
	unmarshal(t, of.RawTBSCertificate, &fields)
	for i := range fields {
		if bytes.Equal(fields[i].FullBytes, of.RawSubjectPublicKeyInfo) {
			fields[i] = asn1.RawValue{FullBytes: spki}
		}
	}
	tbs := marshal(t, fields)
	digest := sha256.Sum256(tbs)
	signature, err := ca.Intermediate.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	unmarshal(t, of.Raw, &fields)
	return marshal(t, []asn1.RawValue{
		{FullBytes: tbs}, fields[1],
		{FullBytes: marshal(t, asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)})},
	})
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	der, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func unmarshal(t testing.TB, der []byte, v any) {
	t.Helper()
	if _, err := asn1.Unmarshal(der, v); err != nil {
		t.Fatal(err)
	}
}

// spki is a public key of any kind.
func spki(t testing.TB, algorithm pkix.AlgorithmIdentifier, key []byte) []byte {
	t.Helper()
	return marshal(t, struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}{algorithm, asn1.BitString{Bytes: key, BitLength: 8 * len(key)}})
}

// Certificates that cost much or that nobody has heard of: refused at once, with
// the process alive.
func TestF60_StrangeCertificates(t *testing.T) {
	k := start(t)
	leaf, key := k.ca.Leaf(t, identitytest.ID(t, frontendID))
	middle := k.ca.Intermediate.Certificate
	rsaKey := func(bits uint) []byte {
		n := new(big.Int).SetBit(new(big.Int).Lsh(big.NewInt(1), bits-1), 0, 1)
		der, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: n, E: 65537})
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	dsa := spki(t, pkix.AlgorithmIdentifier{
		Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1},
		Parameters: asn1.RawValue{FullBytes: marshal(t, struct{ P, Q, G *big.Int }{
			new(big.Int).SetBit(big.NewInt(1), 1023, 1), new(big.Int).SetBit(big.NewInt(1), 159, 1), big.NewInt(2),
		})},
	}, marshal(t, big.NewInt(7)))
	unknown := spki(t, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 7}}, []byte("what is this"))

	for name, chain := range map[string][][]byte{
		"RSA of 16,384 bits":              {withKey(t, k.ca, leaf[0], rsaKey(16384)), middle.Raw},
		"RSA of 16,384 bits behind":       {leaf[0].Raw, middle.Raw, withKey(t, k.ca, middle, rsaKey(16384))},
		"RSA of 8,192 bits behind":        {leaf[0].Raw, middle.Raw, withKey(t, k.ca, middle, rsaKey(8192))}, // crypto/tls takes it
		"DSA":                             {withKey(t, k.ca, leaf[0], dsa), middle.Raw},
		"an unknown kind of key":          {withKey(t, k.ca, leaf[0], unknown), middle.Raw},
		"an authority with a DSA key":     {leaf[0].Raw, withKey(t, k.ca, middle, dsa)},
		"an authority of unknown kind":    {leaf[0].Raw, withKey(t, k.ca, middle, unknown)},
		"a certificate cut in the middle": {leaf[0].Raw[:len(leaf[0].Raw)/2], middle.Raw},
		"no bytes at all":                 {{}},
	} {
		t.Run(name, func(t *testing.T) {
			conf := configOf(k.ca.SVID(t, identitytest.ID(t, frontendID)), "istio")
			conf.Certificates = []tls.Certificate{{Certificate: chain, PrivateKey: key}}
			const times = 10
			cheaply(t, times*20*time.Millisecond, func() {
				for range times {
					refuses(t, k, conf)
					k.next(map[string]any{"end": "handshake failed", "security": "none"})
				}
			})
		})
	}
	k.app.untouched(t)
	echoes(t, k.dialTLS(k.meshConfig(frontendID, "istio")), "hello")
}
