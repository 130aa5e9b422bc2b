package csr

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	_ "crypto/sha1" // for a signature to refuse
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"

	"github.com/meshca/meshca/identity"
)

const own = "spiffe://cluster.local/ns/shop/sa/cart"

// refused parses and demands a refusal whose reason has the text.
func refused(t *testing.T, text []byte, want string) {
	t.Helper()
	key, err := Parse(text, parseID(t, own))
	var refusal *RefusedError
	if !errors.As(err, &refusal) {
		t.Fatalf("Parse = %v, %v; want a refusal with %q", key, err, want)
	}
	if key != nil {
		t.Error("a key came with the refusal")
	}
	if !strings.Contains(refusal.Reason, want) {
		t.Errorf("reason %q; want %q in it", refusal.Reason, want)
	}
	if refusal.Caller.String() != own || !strings.Contains(err.Error(), own) {
		t.Errorf("%q does not say whose CSR it was", err)
	}
	if len(refusal.Reason) > 1400 {
		t.Errorf("the reason has %d bytes", len(refusal.Reason))
	}
}

func accepted(t *testing.T, text []byte, want crypto.PublicKey) {
	t.Helper()
	key, err := Parse(text, parseID(t, own))
	if err != nil {
		t.Fatal(err)
	}
	if !want.(interface{ Equal(crypto.PublicKey) bool }).Equal(key) {
		t.Error("another key came out than went in")
	}
}

// What the clients of Istio's CA send, made the way they make it.
func TestV37_PilotAgentAndZtunnelPass(t *testing.T) {
	id, err := url.Parse(own)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("pilot-agent", func(t *testing.T) {
		// RSA 2048, a subject of one empty organization, a critical SAN.
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
			Subject:         pkix.Name{Organization: []string{""}},
			ExtraExtensions: []pkix.Extension{san(t, true, uri(t, own))},
		}, rsaKey())
		if err != nil {
			t.Fatal(err)
		}
		accepted(t, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), rsaKey().Public())
	})
	t.Run("ztunnel", func(t *testing.T) {
		accepted(t, draft{attributes: extensionRequest(t, san(t, true, uri(t, own)))}.pem(t), ecKey().Public())
	})
	t.Run("standard library", func(t *testing.T) {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id}}, ecKey())
		if err != nil {
			t.Fatal(err)
		}
		accepted(t, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), ecKey().Public())
	})
	t.Run("nothing asked for", func(t *testing.T) {
		accepted(t, draft{}.pem(t), ecKey().Public())
	})
	t.Run("without the last newline", func(t *testing.T) {
		accepted(t, bytes.TrimRight(draft{}.pem(t), "\n"), ecKey().Public())
	})
}

func TestT16_EveryAcceptedKeyType(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"P-256": ecKey(), "P-384": p384, "Ed25519": ed, "RSA 2048": rsaKey()} {
		t.Run(name, func(t *testing.T) { accepted(t, draft{key: key}.pem(t), key.Public()) })
	}
	for _, bits := range []int{2048, 2049, 3072, 4096} {
		if err := checkKey(rsaSPKI(t, modulus(t, bits), big.NewInt(65537))); err != nil {
			t.Errorf("RSA %d: %v", bits, err)
		}
	}
}

// The signature in these requests is always by another key. A reason that
// names the key shows that it was judged before any signature was verified.
func TestT16_V41_KeysAreJudgedBeforeAnySignature(t *testing.T) {
	e := big.NewInt(65537)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	marshal := func(pub any) []byte {
		b, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	ec := func(curve []int, point []byte) []byte {
		return rawSPKI(t, seq(t, der(t, oidEC), der(t, asOID(curve))), point)
	}
	point := marshal(ecKey().Public())[26:]
	compressed := append([]byte{2}, point[1:33]...)
	offCurve := bytes.Clone(point)
	offCurve[64] ^= 1
	dsaParams := struct{ P, Q, G *big.Int }{modulus(t, 1024), modulus(t, 160), big.NewInt(2)}
	tests := map[string]struct {
		spki []byte
		want string
	}{
		"RSA 512":                   {rsaSPKI(t, modulus(t, 512), e), "has 512 bits; 2048 to 4096"},
		"RSA 1024":                  {rsaSPKI(t, modulus(t, 1024), e), "has 1024 bits"},
		"RSA 2047":                  {rsaSPKI(t, modulus(t, 2047), e), "has 2047 bits"},
		"RSA 4097":                  {rsaSPKI(t, modulus(t, 4097), e), "has 4097 bits"},
		"RSA 8192":                  {rsaSPKI(t, modulus(t, 8192), e), "has 8192 bits"},
		"RSA 16384":                 {rsaSPKI(t, modulus(t, 16384), e), "has 16384 bits"},
		"RSA 65536":                 {rsaSPKI(t, modulus(t, 65536), e), "has 65536 bits"},
		"RSA e=1":                   {rsaSPKI(t, modulus(t, 2048), big.NewInt(1)), "exponent is 0x01"},
		"RSA e=3":                   {rsaSPKI(t, modulus(t, 2048), big.NewInt(3)), "exponent is 0x03"},
		"RSA e=65536":               {rsaSPKI(t, modulus(t, 2048), big.NewInt(65536)), "exponent is 0x010000"},
		"RSA e=2^31-1":              {rsaSPKI(t, modulus(t, 2048), big.NewInt(1<<31-1)), "exponent is 0x7fffffff"},
		"RSA e of 2048 bits":        {rsaSPKI(t, modulus(t, 2048), modulus(t, 2048)), "only 65537"},
		"RSA even":                  {rsaSPKI(t, new(big.Int).Lsh(modulus(t, 2047), 1), e), "modulus is even"},
		"RSA negative":              {rsaSPKI(t, new(big.Int).Neg(modulus(t, 2048)), e), "not positive"},
		"RSA without an exponent":   {rawSPKI(t, seq(t, der(t, oidRSA)), seq(t, der(t, modulus(t, 2048)))), "RSA key is malformed"},
		"P-224":                     {marshal(p224.Public()), "curve P-224"},
		"P-521":                     {marshal(p521.Public()), "curve P-521"},
		"secp256k1":                 {ec([]int{1, 3, 132, 0, 10}, point), "curve secp256k1"},
		"P-256 with a P-384 point":  {ec(oidP256, append([]byte{4}, make([]byte, 96)...)), "has 97 bytes"},
		"point at infinity":         {ec(oidP256, []byte{0}), "EC point has 1 bytes"},
		"compressed point":          {ec(oidP256, compressed), "has 33 bytes and form 2"},
		"point off the curve":       {ec(oidP256, offCurve), "does not parse"},
		"EC without a curve":        {rawSPKI(t, seq(t, der(t, oidEC)), point), "algorithm is malformed"},
		"Ed25519 of 33 bytes":       {rawSPKI(t, seq(t, der(t, oidEd25519)), make([]byte, 33)), "33 bytes"},
		"Ed25519 with parameters":   {rawSPKI(t, seq(t, der(t, oidEd25519), []byte{5, 0}), make([]byte, 32)), "too many"},
		"Ed448":                     {rawSPKI(t, seq(t, der(t, asOID([]int{1, 3, 101, 113}))), make([]byte, 57)), "type Ed448"},
		"X25519":                    {rawSPKI(t, seq(t, der(t, asOID([]int{1, 3, 101, 110}))), make([]byte, 32)), "type X25519"},
		"DSA":                       {rawSPKI(t, seq(t, der(t, asOID([]int{1, 2, 840, 10040, 4, 1})), der(t, dsaParams)), []byte{2, 1, 5}), "type DSA"},
		"RSASSA-PSS":                {rawSPKI(t, seq(t, der(t, asOID([]int{1, 2, 840, 113549, 1, 1, 10}))), []byte{2, 1, 5}), "type RSASSA-PSS"},
		"unknown type":              {rawSPKI(t, seq(t, der(t, asOID([]int{1, 2, 3, 4}))), []byte{2, 1, 5}), "type 1.2.3.4"},
		"no key bits":               {rawSPKI(t, seq(t, der(t, oidEC), der(t, oidP256)), nil), "whole number of bytes"},
		"something behind the bits": {seq(t, seq(t, der(t, oidEC), der(t, oidP256)), der(t, asBits(point)), []byte{5, 0}), "too many"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			d := draft{spki: tt.spki}
			text := d.pem(t)
			if name == "RSA 65536" { // over the size limit as a whole
				if err := checkKey(tt.spki); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v; want %q", err, tt.want)
				}
				return
			}
			refused(t, text, tt.want)
		})
	}
}

// The rows of V41: whatever a CSR asks for beyond the caller's ID is a reason
// to refuse it, and the reason names the thing.
func TestV41_T1_V37_NothingButTheOwnIDMayBeAsked(t *testing.T) {
	const other = "spiffe://cluster.local/ns/shop/sa/admin"
	ownSAN := san(t, true, uri(t, own))
	attr := func(exts ...pkix.Extension) draft { return draft{attributes: extensionRequest(t, exts...)} }
	names := func(names ...[]byte) draft { return attr(san(t, true, names...)) }
	many := func(n int, s string) (all [][]byte) {
		for range n {
			all = append(all, uri(t, s))
		}
		return all
	}
	tests := map[string]struct {
		draft draft
		want  string
	}{
		"another's ID":          {names(uri(t, other)), `the identity "` + other + `"`},
		"own and another's":     {names(uri(t, own), uri(t, other)), other},
		"another's and own":     {names(uri(t, other), uri(t, own)), other},
		"own twice":             {names(uri(t, own), uri(t, own)), "more than once"},
		"300 URIs":              {names(many(300, "spiffe://a/b")...), "spiffe://a/b"},
		"other trust domain":    {names(uri(t, "spiffe://evil.example/ns/shop/sa/cart")), "evil.example"},
		"upper case":            {names(uri(t, "spiffe://Cluster.local/ns/shop/sa/cart")), "not the caller's"},
		"upper-case scheme":     {names(uri(t, "SPIFFE://cluster.local/ns/shop/sa/cart")), "not the caller's"},
		"user info":             {names(uri(t, "spiffe://x@cluster.local/ns/shop/sa/cart")), "not the caller's"},
		"port":                  {names(uri(t, "spiffe://cluster.local:1/ns/shop/sa/cart")), "not the caller's"},
		"query":                 {names(uri(t, own+"?x")), "not the caller's"},
		"fragment":              {names(uri(t, own+"#x")), "not the caller's"},
		"double slash":          {names(uri(t, "spiffe://cluster.local//ns/shop/sa/cart")), "not the caller's"},
		"escaped dot":           {names(uri(t, "spiffe://cluster.local/%2e/ns/shop/sa/cart")), "not the caller's"},
		"trailing slash":        {names(uri(t, own+"/")), "not the caller's"},
		"trailing NUL":          {names(uri(t, own+"\x00")), `cart\x00"`},
		"newline":               {names(uri(t, own+"\nlevel=INFO")), `cart\nlevel=INFO"`},
		"2049 bytes":            {names(uri(t, own+strings.Repeat("a", 2049-len(own)))), "not the caller's"},
		"empty URI":             {names(uri(t, "")), "not the caller's"},
		"DNS name":              {names(name(t, 2, "pay.shop")), `DNS name "pay.shop"`},
		"own and a DNS name":    {names(uri(t, own), name(t, 2, "pay.shop")), `DNS name "pay.shop"`},
		"IP address":            {names(name(t, 7, "\x0a\x00\x00\x01")), "IP address"},
		"e-mail":                {names(name(t, 1, "a@b")), `e-mail address "a@b"`},
		"other name":            {names(wrap(t, 2, 0, der(t, asOID([]int{1, 2, 3})))), "otherName"},
		"X.400":                 {names(wrap(t, 2, 3)), "X.400"},
		"directory name":        {names(wrap(t, 2, 4, seq(t, rdn(t, "admin", 2, 5, 4, 3)))), "directory name"},
		"EDI party":             {names(wrap(t, 2, 5)), "EDI"},
		"registered ID":         {names(name(t, 8, "\x2a\x03")), "registered ID"},
		"name of unknown kind":  {names(name(t, 9, "x")), "malformed"},
		"empty SAN":             {names(), "subjectAltName is empty"},
		"SAN no sequence":       {attr(ext([]byte("x"), true, 2, 5, 29, 17)), "subjectAltName is malformed"},
		"SAN with a tail":       {attr(ext(append(seq(t, uri(t, own)), 5, 0), true, 2, 5, 29, 17)), "too many"},
		"two SANs":              {attr(ownSAN, ownSAN), "second subjectAltName"},
		"CA:TRUE":               {attr(ownSAN, ext(seq(t, []byte{1, 1, 0xff}), true, 2, 5, 29, 19)), "extension basicConstraints (2.5.29.19)"},
		"certSign":              {attr(ownSAN, ext([]byte{3, 2, 2, 4}, true, 2, 5, 29, 15)), "extension keyUsage"},
		"EKU any":               {attr(ownSAN, ext(seq(t, der(t, asOID([]int{2, 5, 29, 37, 0}))), false, 2, 5, 29, 37)), "extension extendedKeyUsage"},
		"name constraints":      {attr(ownSAN, ext(seq(t), true, 2, 5, 29, 30)), "extension nameConstraints"},
		"policies":              {attr(ownSAN, ext(seq(t), false, 2, 5, 29, 32)), "extension certificatePolicies"},
		"SCT":                   {attr(ownSAN, ext([]byte{4, 0}, false, 1, 3, 6, 1, 4, 1, 11129, 2, 4, 2)), "signed certificate timestamps"},
		"key ID":                {attr(ext([]byte{4, 0}, false, 2, 5, 29, 14), ownSAN), "extension subjectKeyIdentifier"},
		"unknown critical":      {attr(ownSAN, ext([]byte{5, 0}, true, 1, 2, 3, 4)), "extension 1.2.3.4"},
		"common name":           {draft{subject: seq(t, rdn(t, "admin", 2, 5, 4, 3))}, `commonName (2.5.4.3), "admin"`},
		"subject serial number": {draft{subject: seq(t, rdn(t, "7", 2, 5, 4, 5))}, "serialNumber"},
		"organization":          {draft{subject: seq(t, rdn(t, "system:masters", 2, 5, 4, 10))}, `organization "system:masters"`},
		"empty O and a CN":      {draft{subject: seq(t, rdn(t, "", 2, 5, 4, 10), rdn(t, "x", 2, 5, 4, 3))}, "more than one"},
		"two empty Os":          {draft{subject: seq(t, rdn(t, "", 2, 5, 4, 10), rdn(t, "", 2, 5, 4, 10))}, "more than one"},
		"subject no RDN":        {draft{subject: seq(t, []byte{5, 0})}, "subject is malformed"},
		"challenge password":    {draft{attributes: seq(t, der(t, oidChallenge), set(t, der(t, "secret")))}, "attribute challengePassword"},
		"unknown attribute":     {draft{attributes: seq(t, der(t, asOID([]int{1, 2, 3})), set(t))}, "attribute 1.2.3"},
		"SAN and a password":    {draft{attributes: append(extensionRequest(t, ownSAN), seq(t, der(t, oidChallenge), set(t, der(t, "x")))...)}, "second attribute, challengePassword"},
		"two extension reqs":    {draft{attributes: append(extensionRequest(t, ownSAN), extensionRequest(t, ownSAN)...)}, "second attribute, extensionRequest"},
		"request of two values": {draft{attributes: seq(t, der(t, oidExtensionRequest), set(t, der(t, []pkix.Extension{ownSAN}), der(t, []pkix.Extension{ownSAN})))}, "too many"},
		"request of no value":   {draft{attributes: seq(t, der(t, oidExtensionRequest), set(t))}, "malformed"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			text := tt.draft.pem(t)
			if len(text) > MaxPEM {
				t.Fatalf("the row is too big to test anything: %d bytes", len(text))
			}
			refused(t, text, tt.want)
			if strings.Contains(tt.want, "challenge") {
				if _, err := Parse(text, parseID(t, own)); strings.Contains(err.Error(), "secret") {
					t.Error("the password is in the reason")
				}
			}
		})
	}
}

func TestV53_Encoding(t *testing.T) {
	good := draft{}.pem(t)
	goodDER := draft{}.der(t)
	block := func(typ string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
	}
	tests := map[string]struct {
		text []byte
		want string
	}{
		"nothing":                {nil, "empty"},
		"DER":                    {goodDER, "does not begin with a PEM block"},
		"empty block":            {block(pemType, nil), "malformed"},
		"one byte":               {block(pemType, []byte{0x30}), "malformed"},
		"one byte over the cap":  {append(bytes.Clone(good), make([]byte, MaxPEM+1-len(good))...), "at most 16384"},
		"1 MiB":                  {make([]byte, 1<<20), "at most 16384"},
		"twice":                  {append(bytes.Clone(good), good...), "more than one PEM block"},
		"with a key behind":      {append(bytes.Clone(good), block("PRIVATE KEY", []byte{1})...), "more than one PEM block"},
		"certificate":            {block("CERTIFICATE", goodDER), `of type "CERTIFICATE"`},
		"new certificate req":    {block("NEW CERTIFICATE REQUEST", goodDER), `of type "NEW CERTIFICATE REQUEST"`},
		"trailing text":          {append(bytes.Clone(good), "x"...), "after its PEM block"},
		"trailing NUL":           {append(bytes.Clone(good), 0), "after its PEM block"},
		"leading text":           {append([]byte("hello\n"), good...), "does not begin"},
		"leading newline":        {append([]byte("\n"), good...), "does not begin"},
		"headers":                {pem.EncodeToMemory(&pem.Block{Type: pemType, Headers: map[string]string{"Proc-Type": "4"}, Bytes: goodDER}), "headers"},
		"no end line":            {good[:len(good)-30], "PEM is malformed"},
		"trailing DER":           {block(pemType, append(bytes.Clone(goodDER), 0)), "1 bytes too many"},
		"trailing DER inside":    {draft{after: []byte{5, 0}}.pem(t), "too many"},
		"version 1":              {draft{version: 1}.pem(t), "version is 01"},
		"truncated":              {block(pemType, goodDER[:len(goodDER)-1]), "malformed"},
		"indefinite length":      {block(pemType, append([]byte{0x30, 0x80}, goodDER...)), "malformed"},
		"certificate inside":     {block(pemType, seq(t, seq(t), seq(t))), "malformed"},
		"nested as deep as fits": {block(pemType, deep(t, 5000)), "malformed"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) { refused(t, tt.text, tt.want) })
	}
}

func TestV41_T1_ProofOfPossession(t *testing.T) {
	otherKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(otherKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	flipped := draft{}.der(t)
	flipped[len(flipped)-1] ^= 1
	tests := map[string]struct {
		text []byte
		want string
	}{
		"signed by another key": {draft{spki: spki}.pem(t), "not by its own key"},
		"flipped bit":           {pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: flipped}), "not by its own key"},
		"RSA with SHA-1":        {draft{key: rsaKey(), sigAlg: oidSHA1WithRSA, hash: crypto.SHA1}.pem(t), `signed with "SHA1-RSA"`},
		"ECDSA with SHA-1":      {draft{sigAlg: oidECDSAWithSHA1, hash: crypto.SHA1}.pem(t), `signed with "ECDSA-SHA1"`},
		"MD5":                   {draft{key: rsaKey(), sigAlg: asOID([]int{1, 2, 840, 113549, 1, 1, 4})}.pem(t), `signed with "MD5-RSA"`},
		"unknown algorithm":     {draft{sigAlg: asOID([]int{1, 2, 3})}.pem(t), "signed with"},
		"algorithm of RSA":      {draft{sigAlg: oidSHA256WithRSA}.pem(t), "not by its own key"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) { refused(t, tt.text, tt.want) })
	}
}

// The same key and the same request again: a CSR is not a secret, so replaying
// one yields what it yielded before, for its own caller only.
func TestV41_ReplayedForAnother(t *testing.T) {
	text := draft{attributes: extensionRequest(t, san(t, true, uri(t, own)))}.pem(t)
	accepted(t, text, ecKey().Public())
	accepted(t, text, ecKey().Public())
	other, err := identity.ParseID("spiffe://cluster.local/ns/shop/sa/other")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(text, other); err == nil {
		t.Error("a CSR that names cart was accepted from other")
	}
}
