package csrtest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	_ "crypto/md5" // for signatures to refuse
	"crypto/rand"
	_ "crypto/sha1" // the same
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
)

// Own is the ID of the caller who sends the CSRs.
const Own = "spiffe://cluster.local/ns/shop/sa/cart"

// maxPEM is the bound that is kept to by all rows but those that are about it.
const maxPEM = 16 << 10

// Vector is a CSR that is refused.
type Vector struct {
	PEM    []byte
	Reason string // part of what the refusal says
}

// All returns every table in one, each row under "<table>/<row>".
func All(t testing.TB) map[string]Vector {
	t.Helper()
	all := make(map[string]Vector)
	for table, rows := range map[string]map[string]Vector{
		"key": Keys(t), "wish": Wishes(t), "encoding": Encodings(t), "proof": Proofs(t), "weak key": WeakKeys(t),
	} {
		for name, v := range rows {
			all[table+"/"+name] = v
		}
	}
	return all
}

func asOID(oid []int) asn1.ObjectIdentifier { return oid }

func asBits(b []byte) asn1.BitString { return asn1.BitString{Bytes: b, BitLength: len(b) * 8} }

// Keys are CSRs for keys of a kind, size or form that is not certified. The
// signature is always by another key, so that a reason that names the key shows
// that it was judged before any signature.
func Keys(t testing.TB) map[string]Vector {
	t.Helper()
	e := big.NewInt(65537)
	marshal := func(pub any) []byte {
		b, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	onCurve := func(c elliptic.Curve) []byte {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return marshal(k.Public())
	}
	ec := func(curve []int, point []byte) []byte {
		return rawSPKI(t, Sequence(t, der(t, oidEC), der(t, asOID(curve))), point)
	}
	point := marshal(ECKey().Public())[26:]
	form := func(first byte, rest []byte) []byte { return append([]byte{first}, rest...) }
	flip := func(b []byte, i int) []byte {
		b = bytes.Clone(b)
		b[i] ^= 1
		return b
	}
	p384 := onCurve(elliptic.P384())[23:]
	dsaParams := struct{ P, Q, G *big.Int }{Modulus(t, 1024), Modulus(t, 160), big.NewInt(2)}
	unused := func(spki []byte, bits byte) []byte { // of the BIT STRING's last byte
		spki = bytes.Clone(spki)
		spki[len(spki)-len(point)-1] = bits
		return spki
	}
	vectors := make(map[string]Vector)
	for name, row := range map[string]struct {
		spki []byte
		want string
	}{
		"RSA 512":                   {RSASPKI(t, Modulus(t, 512), e), "has 512 bits; 2048 to 4096"},
		"RSA 1024":                  {RSASPKI(t, Modulus(t, 1024), e), "has 1024 bits"},
		"RSA 2047":                  {RSASPKI(t, Modulus(t, 2047), e), "has 2047 bits"},
		"RSA 4097":                  {RSASPKI(t, Modulus(t, 4097), e), "has 4097 bits"},
		"RSA 8192":                  {RSASPKI(t, Modulus(t, 8192), e), "has 8192 bits"},
		"RSA 16384":                 {RSASPKI(t, Modulus(t, 16384), e), "has 16384 bits"},
		"RSA 65536":                 {RSASPKI(t, Modulus(t, 65536), e), "has 65536 bits"},
		"RSA e=1":                   {RSASPKI(t, Modulus(t, 2048), big.NewInt(1)), "exponent is 0x01"},
		"RSA e=3":                   {RSASPKI(t, Modulus(t, 2048), big.NewInt(3)), "exponent is 0x03"},
		"RSA e=65536":               {RSASPKI(t, Modulus(t, 2048), big.NewInt(65536)), "exponent is 0x010000"},
		"RSA e=2^31-1":              {RSASPKI(t, Modulus(t, 2048), big.NewInt(1<<31-1)), "exponent is 0x7fffffff"},
		"RSA e of 2048 bits":        {RSASPKI(t, Modulus(t, 2048), Modulus(t, 2048)), "only 65537"},
		"RSA even":                  {RSASPKI(t, new(big.Int).Lsh(Modulus(t, 2047), 1), e), "modulus is even"},
		"RSA negative":              {RSASPKI(t, new(big.Int).Neg(Modulus(t, 2048)), e), "not positive"},
		"RSA without an exponent":   {rawSPKI(t, Sequence(t, der(t, oidRSA)), Sequence(t, der(t, Modulus(t, 2048)))), "RSA key is malformed"},
		"P-224":                     {onCurve(elliptic.P224()), "curve P-224"},
		"P-521":                     {onCurve(elliptic.P521()), "curve P-521"},
		"secp256k1":                 {ec([]int{1, 3, 132, 0, 10}, point), "curve secp256k1"},
		"P-256 with a P-384 point":  {ec(oidP256, append([]byte{4}, make([]byte, 96)...)), "has 97 bytes"},
		"point at infinity":         {ec(oidP256, []byte{0}), "EC point has 1 bytes"},
		"compressed point":          {ec(oidP256, form(2, point[1:33])), "has 33 bytes and form 2"},
		"point off the curve":       {ec(oidP256, flip(point, 64)), "does not parse"},
		"EC without a curve":        {rawSPKI(t, Sequence(t, der(t, oidEC)), point), "algorithm is malformed"},
		"Ed25519 of 33 bytes":       {rawSPKI(t, Sequence(t, der(t, oidEd25519)), make([]byte, 33)), "33 bytes"},
		"Ed25519 with parameters":   {rawSPKI(t, Sequence(t, der(t, oidEd25519), []byte{5, 0}), make([]byte, 32)), "too many"},
		"Ed448":                     {rawSPKI(t, Sequence(t, der(t, asOID([]int{1, 3, 101, 113}))), make([]byte, 57)), "type Ed448"},
		"X25519":                    {rawSPKI(t, Sequence(t, der(t, asOID([]int{1, 3, 101, 110}))), make([]byte, 32)), "type X25519"},
		"DSA":                       {rawSPKI(t, Sequence(t, der(t, asOID([]int{1, 2, 840, 10040, 4, 1})), der(t, dsaParams)), []byte{2, 1, 5}), "type DSA"},
		"RSASSA-PSS":                {rawSPKI(t, Sequence(t, der(t, asOID([]int{1, 2, 840, 113549, 1, 1, 10}))), []byte{2, 1, 5}), "type RSASSA-PSS"},
		"unknown type":              {rawSPKI(t, Sequence(t, der(t, asOID([]int{1, 2, 3, 4}))), []byte{2, 1, 5}), "type 1.2.3.4"},
		"no key bits":               {rawSPKI(t, Sequence(t, der(t, oidEC), der(t, oidP256)), nil), "whole number of bytes"},
		"something behind the bits": {Sequence(t, Sequence(t, der(t, oidEC), der(t, oidP256)), der(t, asBits(point)), []byte{5, 0}), "too many"},
		"RSA e=65539":               {RSASPKI(t, Modulus(t, 2048), big.NewInt(65539)), "exponent is 0x010003"},
		"RSA e=2":                   {RSASPKI(t, Modulus(t, 2048), big.NewInt(2)), "exponent is 0x02"},
		"RSA e=0":                   {RSASPKI(t, Modulus(t, 2048), big.NewInt(0)), "exponent is 0x00"},
		"RSA e=-65537":              {RSASPKI(t, Modulus(t, 2048), big.NewInt(-65537)), "only 65537"},
		"RSA e padded":              {rawSPKI(t, Sequence(t, der(t, oidRSA), asn1.NullBytes), Sequence(t, der(t, Modulus(t, 2048)), []byte{2, 4, 0, 1, 0, 1})), "only 65537"},
		"RSA zero":                  {RSASPKI(t, big.NewInt(0), e), "has 0 bits"},
		"RSA modulus of no bytes":   {rawSPKI(t, Sequence(t, der(t, oidRSA), asn1.NullBytes), Sequence(t, []byte{2, 0}, der(t, e))), "not positive"},
		"RSA exponent of no bytes":  {rawSPKI(t, Sequence(t, der(t, oidRSA), asn1.NullBytes), Sequence(t, der(t, Modulus(t, 2048)), []byte{2, 0})), "only 65537"},
		"RSA with a third number":   {rawSPKI(t, Sequence(t, der(t, oidRSA), asn1.NullBytes), Sequence(t, der(t, Modulus(t, 2048)), der(t, e), der(t, e))), "too many"},
		"RSA without the sequence":  {rawSPKI(t, Sequence(t, der(t, oidRSA), asn1.NullBytes), der(t, Modulus(t, 2048))), "RSA key is malformed"},
		"RSA by an EC point":        {rawSPKI(t, Sequence(t, der(t, oidRSA), asn1.NullBytes), point), "RSA key is malformed"},
		"EC by an RSA key":          {ec(oidP256, marshal(RSAKey().Public())[24:]), "EC point has"},
		"P-384 with a P-256 point":  {ec(oidP384, point), "has 65 bytes"},
		"P-384 off the curve":       {ec(oidP384, flip(p384, 96)), "does not parse"},
		"P-384's point as P-256":    {ec(oidP256, p384), "has 97 bytes"},
		"P-256 of zeros":            {ec(oidP256, form(4, make([]byte, 64))), "does not parse"},
		"P-256 beyond the field":    {ec(oidP256, form(4, bytes.Repeat([]byte{0xff}, 64))), "does not parse"},
		"other compressed point":    {ec(oidP256, form(3, point[1:33])), "has 33 bytes and form 3"},
		"hybrid point":              {ec(oidP256, form(6, point[1:])), "and form 6"},
		"point a byte short":        {ec(oidP256, point[:64]), "has 64 bytes"},
		"point a byte long":         {ec(oidP256, append(bytes.Clone(point), 0)), "has 66 bytes"},
		"brainpoolP256r1":           {ec([]int{1, 3, 36, 3, 3, 2, 8, 1, 1, 7}, point), "curve 1.3.36.3.3.2.8.1.1.7"},
		"curve by its equation":     {rawSPKI(t, Sequence(t, der(t, oidEC), Sequence(t, der(t, 1))), point), "algorithm is malformed"},
		"implicit curve":            {rawSPKI(t, Sequence(t, der(t, oidEC), asn1.NullBytes), point), "algorithm is malformed"},
		"two curves":                {rawSPKI(t, Sequence(t, der(t, oidEC), der(t, oidP256), der(t, oidP384)), point), "too many"},
		"seven unused bits":         {unused(marshal(ECKey().Public()), 7), "whole number of bytes"},
		"Ed25519 of 31 bytes":       {rawSPKI(t, Sequence(t, der(t, oidEd25519)), make([]byte, 31)), "31 bytes"},
		"X448":                      {rawSPKI(t, Sequence(t, der(t, asOID([]int{1, 3, 101, 111}))), make([]byte, 56)), "type X448"},
		"ML-DSA-65":                 {rawSPKI(t, Sequence(t, der(t, asOID([]int{2, 16, 840, 1, 101, 3, 4, 3, 18}))), make([]byte, 1952)), "type 2.16.840.1.101.3.4.3.18"},
		"a type of many numbers":    {rawSPKI(t, Sequence(t, append([]byte{6, 0x82, 0x10, 0}, bytes.Repeat([]byte{1}, 4096)...)), []byte{2, 1, 5}), "type 0.1.1.1"},
		"no type":                   {rawSPKI(t, Sequence(t), []byte{2, 1, 5}), "algorithm is malformed"},
	} {
		vectors[name] = Vector{Draft{SPKI: row.spki}.PEM(t), row.want}
	}
	return vectors
}

// Wishes are CSRs, good otherwise, that ask for more than the caller's ID.
func Wishes(t testing.TB) map[string]Vector {
	t.Helper()
	const other = "spiffe://cluster.local/ns/shop/sa/admin"
	ownSAN := SAN(t, true, URI(t, Own))
	attr := func(exts ...pkix.Extension) Draft { return Draft{Attributes: ExtensionRequest(t, exts...)} }
	names := func(names ...[]byte) Draft { return attr(SAN(t, true, names...)) }
	many := func(n int, s string) (all [][]byte) {
		for range n {
			all = append(all, URI(t, s))
		}
		return all
	}
	usage := func(last int) pkix.Extension { // of id-kp
		return ext(Sequence(t, der(t, asOID([]int{1, 3, 6, 1, 5, 5, 7, 3, last}))), false, 2, 5, 29, 37)
	}
	organization := func(tag int, compound bool) Draft {
		empty := der(t, asn1.RawValue{Tag: tag, IsCompound: compound})
		return Draft{Subject: Sequence(t, Set(t, Sequence(t, der(t, asOID([]int{2, 5, 4, 10})), empty)))}
	}
	pair := Sequence(t, der(t, asOID([]int{2, 5, 4, 10})), der(t, asn1.RawValue{Tag: asn1.TagUTF8String}))
	vectors := make(map[string]Vector)
	for name, row := range map[string]struct {
		draft Draft
		want  string
	}{
		"another's ID":          {names(URI(t, other)), `the identity "` + other + `"`},
		"own and another's":     {names(URI(t, Own), URI(t, other)), other},
		"another's and own":     {names(URI(t, other), URI(t, Own)), other},
		"own twice":             {names(URI(t, Own), URI(t, Own)), "more than once"},
		"300 URIs":              {names(many(300, "spiffe://a/b")...), "spiffe://a/b"},
		"other trust domain":    {names(URI(t, "spiffe://evil.example/ns/shop/sa/cart")), "evil.example"},
		"upper case":            {names(URI(t, "spiffe://Cluster.local/ns/shop/sa/cart")), "not the caller's"},
		"upper-case scheme":     {names(URI(t, "SPIFFE://cluster.local/ns/shop/sa/cart")), "not the caller's"},
		"user info":             {names(URI(t, "spiffe://x@cluster.local/ns/shop/sa/cart")), "not the caller's"},
		"port":                  {names(URI(t, "spiffe://cluster.local:1/ns/shop/sa/cart")), "not the caller's"},
		"query":                 {names(URI(t, Own+"?x")), "not the caller's"},
		"fragment":              {names(URI(t, Own+"#x")), "not the caller's"},
		"double slash":          {names(URI(t, "spiffe://cluster.local//ns/shop/sa/cart")), "not the caller's"},
		"escaped dot":           {names(URI(t, "spiffe://cluster.local/%2e/ns/shop/sa/cart")), "not the caller's"},
		"trailing slash":        {names(URI(t, Own+"/")), "not the caller's"},
		"trailing NUL":          {names(URI(t, Own+"\x00")), `cart\x00"`},
		"newline":               {names(URI(t, Own+"\nlevel=INFO")), `cart\nlevel=INFO"`},
		"2049 bytes":            {names(URI(t, Own+strings.Repeat("a", 2049-len(Own)))), "not the caller's"},
		"empty URI":             {names(URI(t, "")), "not the caller's"},
		"DNS name":              {names(Name(t, 2, "pay.shop")), `DNS name "pay.shop"`},
		"own and a DNS name":    {names(URI(t, Own), Name(t, 2, "pay.shop")), `DNS name "pay.shop"`},
		"IP address":            {names(Name(t, 7, "\x0a\x00\x00\x01")), "IP address"},
		"e-mail":                {names(Name(t, 1, "a@b")), `e-mail address "a@b"`},
		"other name":            {names(wrap(t, 2, 0, der(t, asOID([]int{1, 2, 3})))), "otherName"},
		"X.400":                 {names(wrap(t, 2, 3)), "X.400"},
		"directory name":        {names(wrap(t, 2, 4, Sequence(t, RDN(t, "admin", 2, 5, 4, 3)))), "directory name"},
		"EDI party":             {names(wrap(t, 2, 5)), "EDI"},
		"registered ID":         {names(Name(t, 8, "\x2a\x03")), "registered ID"},
		"name of unknown kind":  {names(Name(t, 9, "x")), "malformed"},
		"empty SAN":             {names(), "subjectAltName is empty"},
		"SAN no sequence":       {attr(ext([]byte("x"), true, 2, 5, 29, 17)), "subjectAltName is malformed"},
		"SAN with a tail":       {attr(ext(append(Sequence(t, URI(t, Own)), 5, 0), true, 2, 5, 29, 17)), "too many"},
		"two SANs":              {attr(ownSAN, ownSAN), "second subjectAltName"},
		"CA:TRUE":               {attr(ownSAN, ext(Sequence(t, []byte{1, 1, 0xff}), true, 2, 5, 29, 19)), "extension basicConstraints (2.5.29.19)"},
		"certSign":              {attr(ownSAN, ext([]byte{3, 2, 2, 4}, true, 2, 5, 29, 15)), "extension keyUsage"},
		"EKU any":               {attr(ownSAN, ext(Sequence(t, der(t, asOID([]int{2, 5, 29, 37, 0}))), false, 2, 5, 29, 37)), "extension extendedKeyUsage"},
		"name constraints":      {attr(ownSAN, ext(Sequence(t), true, 2, 5, 29, 30)), "extension nameConstraints"},
		"policies":              {attr(ownSAN, ext(Sequence(t), false, 2, 5, 29, 32)), "extension certificatePolicies"},
		"SCT":                   {attr(ownSAN, ext([]byte{4, 0}, false, 1, 3, 6, 1, 4, 1, 11129, 2, 4, 2)), "signed certificate timestamps"},
		"key ID":                {attr(ext([]byte{4, 0}, false, 2, 5, 29, 14), ownSAN), "extension subjectKeyIdentifier"},
		"unknown critical":      {attr(ownSAN, ext([]byte{5, 0}, true, 1, 2, 3, 4)), "extension 1.2.3.4"},
		"common name":           {Draft{Subject: Sequence(t, RDN(t, "admin", 2, 5, 4, 3))}, `commonName (2.5.4.3), "admin"`},
		"subject serial number": {Draft{Subject: Sequence(t, RDN(t, "7", 2, 5, 4, 5))}, "serialNumber"},
		"organization":          {Draft{Subject: Sequence(t, RDN(t, "system:masters", 2, 5, 4, 10))}, `organization "system:masters"`},
		"empty O and a CN":      {Draft{Subject: Sequence(t, RDN(t, "", 2, 5, 4, 10), RDN(t, "x", 2, 5, 4, 3))}, "more than one"},
		"two empty Os":          {Draft{Subject: Sequence(t, RDN(t, "", 2, 5, 4, 10), RDN(t, "", 2, 5, 4, 10))}, "more than one"},
		"subject no RDN":        {Draft{Subject: Sequence(t, []byte{5, 0})}, "subject is malformed"},
		"challenge password":    {Draft{Attributes: Sequence(t, der(t, oidChallenge), Set(t, der(t, "secret")))}, "attribute challengePassword"},
		"unknown attribute":     {Draft{Attributes: Sequence(t, der(t, asOID([]int{1, 2, 3})), Set(t))}, "attribute 1.2.3"},
		"SAN and a password":    {Draft{Attributes: append(ExtensionRequest(t, ownSAN), Sequence(t, der(t, oidChallenge), Set(t, der(t, "x")))...)}, "second attribute, challengePassword"},
		"two extension reqs":    {Draft{Attributes: append(ExtensionRequest(t, ownSAN), ExtensionRequest(t, ownSAN)...)}, "second attribute, extensionRequest"},
		"request of two values": {Draft{Attributes: Sequence(t, der(t, oidExtensionRequest), Set(t, der(t, []pkix.Extension{ownSAN}), der(t, []pkix.Extension{ownSAN})))}, "too many"},
		"request of no value":   {Draft{Attributes: Sequence(t, der(t, oidExtensionRequest), Set(t))}, "malformed"},
		"2,500 short names":     {names(many(2500, "")...), "not the caller's"},
		"own, 200 times":        {names(many(200, Own)...), "more than once"},
		"Cyrillic letter":       {names(URI(t, "spiffe://cluster.local/ns/shop/sa/c\u0430rt")), "not the caller's"},
		"umlaut in the domain":  {names(URI(t, "spiffe://cl\u00fcster.local/ns/shop/sa/cart")), "not the caller's"},
		"punycode":              {names(URI(t, "spiffe://xn--clster-3ya.local/ns/shop/sa/cart")), "not the caller's"},
		"no UTF-8":              {names(URI(t, "spiffe://cluster.local/ns/shop/sa/c\xffrt")), "not the caller's"},
		"NUL inside":            {names(URI(t, "spiffe://cluster.local\x00.evil.example/ns/shop/sa/cart")), "not the caller's"},
		"NUL before":            {names(URI(t, "\x00"+Own)), "not the caller's"},
		"carriage return":       {names(URI(t, Own+"\r")), "not the caller's"},
		"space before":          {names(URI(t, " "+Own)), "not the caller's"},
		"empty user info":       {names(URI(t, "spiffe://@cluster.local/ns/shop/sa/cart")), "not the caller's"},
		"empty port":            {names(URI(t, "spiffe://cluster.local:/ns/shop/sa/cart")), "not the caller's"},
		"empty query":           {names(URI(t, Own+"?")), "not the caller's"},
		"empty fragment":        {names(URI(t, Own+"#")), "not the caller's"},
		"dots in the path":      {names(URI(t, "spiffe://cluster.local/ns/bank/../shop/sa/cart")), "not the caller's"},
		"escaped letter":        {names(URI(t, "spiffe://cluster.local/ns/shop/sa/%63art")), "not the caller's"},
		"upper case in a name":  {names(URI(t, "spiffe://cluster.local/ns/shop/sa/Cart")), "not the caller's"},
		"the trust domain":      {names(URI(t, "spiffe://cluster.local")), "not the caller's"},
		"a prefix":              {names(URI(t, Own[:len(Own)-1])), "not the caller's"},
		"a longer name":         {names(URI(t, Own+"s")), "not the caller's"},
		"https":                 {names(URI(t, "https://cluster.local/ns/shop/sa/cart")), "not the caller's"},
		"no scheme":             {names(URI(t, "//cluster.local/ns/shop/sa/cart")), "not the caller's"},
		"URI made of parts":     {names(wrap(t, 2, 6, []byte(Own))), "malformed"},
		"URI as a string":       {names(der(t, asn1.RawValue{Tag: asn1.TagIA5String, Bytes: []byte(Own)})), "malformed"},
		"DNS name of the ID":    {names(Name(t, 2, Own)), "DNS name"},
		"wildcard":              {names(Name(t, 2, "*")), `DNS name "*"`},
		"empty DNS name":        {names(Name(t, 2, "")), "DNS name"},
		"IPv6 address":          {names(Name(t, 7, strings.Repeat("\x01", 16))), "IP address"},
		"IP address of 5 bytes": {names(Name(t, 7, "12345")), "IP address"},
		"name with a long tag":  {names([]byte{0x9f, 0x81, 0x06, 1, 'x'}), "malformed"},
		"name cut off":          {names([]byte{0x86, 40, 's'}), "malformed"},
		"other name for a user": {names(wrap(t, 2, 0, der(t, asOID([]int{1, 3, 6, 1, 4, 1, 311, 20, 2, 3})))), "otherName"},
		"empty SAN, not crit":   {attr(SAN(t, false)), "subjectAltName is empty"},
		"SAN of no bytes":       {attr(ext(nil, true, 2, 5, 29, 17)), "subjectAltName is malformed"},
		"SAN as a set":          {attr(ext(Set(t, URI(t, Own)), true, 2, 5, 29, 17)), "subjectAltName is malformed"},
		"SAN and another SAN":   {attr(ownSAN, SAN(t, false, URI(t, other))), "second subjectAltName"},
		"CA:TRUE, pathlen 3":    {attr(ownSAN, ext(Sequence(t, []byte{1, 1, 0xff}, der(t, 3)), true, 2, 5, 29, 19)), "extension basicConstraints"},
		"CA:FALSE":              {attr(ownSAN, ext(Sequence(t), true, 2, 5, 29, 19)), "extension basicConstraints"},
		"CA:TRUE, twice":        {attr(ext(Sequence(t, []byte{1, 1, 0xff}), true, 2, 5, 29, 19), ext(Sequence(t), true, 2, 5, 29, 19)), "extension basicConstraints"},
		"digitalSignature":      {attr(ext([]byte{3, 2, 7, 0x80}, true, 2, 5, 29, 15)), "extension keyUsage"},
		"EKU for clients":       {attr(ownSAN, usage(2)), "extension extendedKeyUsage"},
		"EKU code signing":      {attr(ownSAN, usage(3)), "extension extendedKeyUsage"},
		"EKU OCSP":              {attr(ownSAN, usage(9)), "extension extendedKeyUsage"},
		"EKU of no bytes":       {attr(ext(nil, true, 2, 5, 29, 37)), "extension extendedKeyUsage"},
		"any policy":            {attr(ext(Sequence(t, Sequence(t, der(t, asOID([]int{2, 5, 29, 32, 0})))), true, 2, 5, 29, 32)), "extension certificatePolicies"},
		"policy mappings":       {attr(ownSAN, ext(Sequence(t), true, 2, 5, 29, 33)), "extension 2.5.29.33"},
		"issuer's names":        {attr(ownSAN, ext(Sequence(t, URI(t, Own)), false, 2, 5, 29, 18)), "extension 2.5.29.18"},
		"must-staple":           {attr(ext(Sequence(t, der(t, 5)), false, 1, 3, 6, 1, 5, 5, 7, 1, 24), ownSAN), "extension 1.3.6.1.5.5.7.1.24"},
		"unknown, not critical": {attr(ownSAN, ext([]byte{5, 0}, false, 1, 2, 3, 4)), "extension 1.2.3.4"},
		"1,000 unknown":         {attr(repeat(1000, ext(nil, false, 1, 2))...), "extension 1.2"},
		"another's ID as CN":    {Draft{Subject: Sequence(t, RDN(t, other, 2, 5, 4, 3))}, `commonName (2.5.4.3), "` + other + `"`},
		"own ID as CN":          {Draft{Subject: Sequence(t, RDN(t, Own, 2, 5, 4, 3)), Attributes: ExtensionRequest(t, ownSAN)}, "commonName (2.5.4.3)"},
		"empty CN":              {Draft{Subject: Sequence(t, RDN(t, "", 2, 5, 4, 3))}, "commonName (2.5.4.3)"},
		"e-mail in the subject": {Draft{Subject: Sequence(t, RDN(t, "a@b", 1, 2, 840, 113549, 1, 9, 1))}, "emailAddress"},
		"two Os in one RDN":     {Draft{Subject: Sequence(t, Set(t, pair, pair))}, "more than one"},
		"O as a sequence":       {organization(asn1.TagSequence, true), "subject is malformed"},
		"O as null":             {organization(asn1.TagNull, false), "subject is malformed"},
		"O without a value":     {Draft{Subject: Sequence(t, Set(t, Sequence(t, der(t, asOID([]int{2, 5, 4, 10})))))}, "subject is malformed"},
		"empty RDN":             {Draft{Subject: Sequence(t, Set(t))}, "subject is malformed"},
		"subject of 8 KiB":      {Draft{Subject: Sequence(t, RDN(t, strings.Repeat("x", 8<<10), 2, 5, 4, 3))}, "commonName (2.5.4.3)"},
		"attribute no sequence": {Draft{Attributes: []byte{5, 0}}, "attributes is malformed"},
		"request as a sequence": {Draft{Attributes: Sequence(t, der(t, oidExtensionRequest), Sequence(t, der(t, []pkix.Extension{ownSAN})))}, "malformed"},
		"Microsoft's request":   {Draft{Attributes: Sequence(t, der(t, asOID([]int{1, 3, 6, 1, 4, 1, 311, 2, 1, 14})), Set(t, der(t, []pkix.Extension{ownSAN})))}, "attribute 1.3.6.1.4.1.311.2.1.14"},
	} {
		text := row.draft.PEM(t)
		if len(text) > maxPEM {
			t.Fatalf("row %q is too big to test anything: %d bytes", name, len(text))
		}
		vectors[name] = Vector{text, row.want}
	}
	return vectors
}

func repeat(n int, e pkix.Extension) (all []pkix.Extension) {
	for range n {
		all = append(all, e)
	}
	return all
}

// Encodings are CSRs that are no PEM, no DER, or not one request.
func Encodings(t testing.TB) map[string]Vector {
	t.Helper()
	goodDER := Draft{}.DER(t)
	good := armor(goodDER)
	block := func(typ string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
	}
	var tenThousand [][]byte
	for range 10_000 {
		tenThousand = append(tenThousand, URI(t, Own))
	}
	const begin = "-----BEGIN " + pemType + "-----\n"
	lines := func(n int, line string) string { return begin + strings.Repeat(line+"\n", n) + "\n" }
	oneLine := begin + base64.StdEncoding.EncodeToString(goodDER) + "\n"
	return map[string]Vector{
		"nothing":                {nil, "empty"},
		"DER":                    {goodDER, "does not begin with a PEM block"},
		"empty block":            {block(pemType, nil), "malformed"},
		"one byte":               {block(pemType, []byte{0x30}), "malformed"},
		"one byte over the cap":  {append(bytes.Clone(good), make([]byte, maxPEM+1-len(good))...), "at most 16384"},
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
		"trailing DER inside":    {Draft{After: []byte{5, 0}}.PEM(t), "too many"},
		"version 1":              {Draft{Version: 1}.PEM(t), "version is 01"},
		"truncated":              {block(pemType, goodDER[:len(goodDER)-1]), "malformed"},
		"indefinite length":      {block(pemType, append([]byte{0x30, 0x80}, goodDER...)), "malformed"},
		"certificate inside":     {block(pemType, Sequence(t, Sequence(t), Sequence(t))), "malformed"},
		"nested as deep as fits": {block(pemType, deep(t, 5000)), "malformed"},
		"36 KiB of DER":          {block(pemType, make([]byte, 36<<10)), "at most 16384"},
		"64 KiB of DER":          {block(pemType, make([]byte, 64<<10)), "at most 16384"},
		"1 MiB of DER":           {block(pemType, make([]byte, 1<<20)), "at most 16384"},
		"10,000 names":           {Draft{Attributes: ExtensionRequest(t, SAN(t, true, tenThousand...))}.PEM(t), "at most 16384"},
		"as long as allowed":     {append([]byte("-----BEGIN "), bytes.Repeat([]byte("A"), maxPEM-11)...), "PEM is malformed"},
		"blank":                  {[]byte(" \n"), "does not begin with a PEM block"},
		"1,500 headers":          {[]byte(lines(1500, "a: b") + oneLine[len(begin):]), "PEM is malformed"},
		"a header of 12 KiB":     {[]byte(begin + "a: " + strings.Repeat("b", 12<<10) + "\n\n" + oneLine[len(begin):] + "-----END " + pemType + "-----\n"), "headers"},
		"600 end lines":          {[]byte(oneLine + strings.Repeat("-----END X-----\n", 600)), "PEM is malformed"},
		"dashes":                 {[]byte(begin + strings.Repeat("-", 12<<10)), "PEM is malformed"},
		"blank lines":            {[]byte(begin + strings.Repeat("\n", 12<<10)), "PEM is malformed"},
		"only a begin line":      {[]byte("-----BEGIN " + pemType + "-----\n"), "PEM is malformed"},
		"public key":             {block("PUBLIC KEY", goodDER), `of type "PUBLIC KEY"`},
		"private key":            {block("EC PRIVATE KEY", goodDER), "it is a private key"},
		"no type":                {block("", goodDER), `of type ""`},
		"type in lower case":     {block("certificate request", goodDER), `of type "certificate request"`},
		"type with a space":      {block(pemType+" ", goodDER), "of type"},
		"another end line":       {[]byte(oneLine + "-----END CERTIFICATE-----\n"), "PEM is malformed"},
		"twice in one block":     {block(pemType, append(bytes.Clone(goodDER), goodDER...)), "too many"},
		"PEM in PEM":             {block(pemType, good), "malformed"},
		"garbage base64":         {[]byte("-----BEGIN " + pemType + "-----\n!!!!\n-----END " + pemType + "-----\n"), "PEM is malformed"},
		"URL alphabet":           {[]byte("-----BEGIN " + pemType + "-----\nMI-_\n-----END " + pemType + "-----\n"), "PEM is malformed"},
		"length in many bytes":   {block(pemType, append([]byte{0x30, 0x84, 0, 0, 0, byte(len(goodDER) - 4)}, goodDER[4:]...)), "malformed"},
		"length of 4 GiB":        {block(pemType, []byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0}), "malformed"},
		"length of 2^63":         {block(pemType, []byte{0x30, 0x88, 0x80, 0, 0, 0, 0, 0, 0, 0}), "malformed"},
		"no signature":           {block(pemType, Sequence(t, Sequence(t), Sequence(t, der(t, oidECDSAWithSHA256)))), "malformed"},
		"version of two bytes":   {Draft{Version: 256}.PEM(t), "version is 0100"},
		"version -1":             {Draft{Version: -1}.PEM(t), "version is ff"},
		"null":                   {block(pemType, asn1.NullBytes), "malformed"},
		"zeros":                  {block(pemType, make([]byte, 8<<10)), "malformed"},
		"ones":                   {block(pemType, bytes.Repeat([]byte{0xff}, 8<<10)), "malformed"},
	}
}

// deep is a sequence in a sequence, and so on, in 8 KiB at most.
func deep(t testing.TB, levels int) []byte {
	t.Helper()
	var b []byte
	for range levels {
		if len(b) > 8<<10 {
			break
		}
		b = Sequence(t, b)
	}
	return b
}

// Proofs are CSRs whose signature proves nothing.
func Proofs(t testing.TB) map[string]Vector {
	t.Helper()
	otherKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(otherKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	flipped := Draft{}.DER(t)
	flipped[len(flipped)-1] ^= 1
	signature := func(b []byte) []byte { // over nothing
		good := Draft{}.DER(t)
		var parts struct {
			Body, Algorithm asn1.RawValue
			Signature       asn1.BitString
		}
		if _, err := asn1.Unmarshal(good, &parts); err != nil {
			t.Fatal(err)
		}
		return armor(Sequence(t, parts.Body.FullBytes, parts.Algorithm.FullBytes, der(t, asBits(b))))
	}
	return map[string]Vector{
		"signed by another key": {Draft{SPKI: spki}.PEM(t), "not by its own key"},
		"flipped bit":           {pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: flipped}), "not by its own key"},
		"RSA with SHA-1":        {Draft{Key: RSAKey(), SigAlg: oidSHA1WithRSA, Hash: crypto.SHA1}.PEM(t), `signed with "SHA1-RSA"`},
		"ECDSA with SHA-1":      {Draft{SigAlg: oidECDSAWithSHA1, Hash: crypto.SHA1}.PEM(t), `signed with "ECDSA-SHA1"`},
		"MD5":                   {Draft{Key: RSAKey(), SigAlg: oidMD5WithRSA, Hash: crypto.MD5}.PEM(t), `signed with "MD5-RSA"`},
		"unknown algorithm":     {Draft{SigAlg: asOID([]int{1, 2, 3})}.PEM(t), "signed with"},
		"algorithm of RSA":      {Draft{SigAlg: oidSHA256WithRSA}.PEM(t), "not by its own key"},
		"of no bytes":           {signature(nil), "not by its own key"},
		"of zeros":              {signature(make([]byte, 64)), "not by its own key"},
		"of two zeros":          {signature(Sequence(t, der(t, 0), der(t, 0))), "not by its own key"},
		"of two ones":           {signature(Sequence(t, der(t, 1), der(t, 1))), "not by its own key"},
		"with a tail":           {signature(append(Sequence(t, der(t, 1), der(t, 1)), 0)), "not by its own key"},
		"of 8 KiB":              {signature(make([]byte, 8<<10)), "not by its own key"},
		"RSA by another hash":   {Draft{Key: RSAKey(), Hash: crypto.SHA384}.PEM(t), "not by its own key"},
		"algorithm of Ed25519":  {Draft{SigAlg: oidEd25519}.PEM(t), "not by its own key"},
	}
}
