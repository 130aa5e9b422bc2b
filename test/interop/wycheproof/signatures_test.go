package wycheproof

import (
	"cmp"
	"fmt"
	"strings"
	"testing"

	"github.com/meshca/meshca/identity/token"
)

// signatureFile is one of Wycheproof's files of signatures, of any kind.
type signatureFile struct {
	TestGroups []struct {
		PublicKey struct {
			Curve                   string
			WX, WY                  string // of ECDSA keys
			Modulus, PublicExponent string // of RSA keys
		}
		PrivateKey struct{ Modulus, PublicExponent string } // where signatures are to be made
		SHA        string
		MGF        string
		MGFSHA     string `json:"mgfSha"`
		SLen       int    // of the salt
		Tests      []struct {
			TcID                      int
			Comment, Msg, Sig, Result string
		}
	}
}

var curves = map[string]struct {
	name      string
	size      int
	alg, hash string
}{
	"secp256r1": {"P-256", 32, "ES256", "SHA-256"},
	"secp384r1": {"P-384", 48, "ES384", "SHA-384"},
	"secp521r1": {"P-521", 66, "ES512", "SHA-512"},
}

// ECDSA signatures in JOSE's form. Those by the hash that goes with a curve are
// judged as Wycheproof has it. By any other hash they are refused, and keys on other
// curves are not published.
func TestV58_ECDSA(t *testing.T) {
	t.Parallel()
	c := newTally(nil)
	for _, file := range names(t, "ecdsa_*_p1363_test.json") {
		var f signatureFile
		read(t, file, &f)
		for i, g := range f.TestGroups {
			curve, known := curves[g.PublicKey.Curve]
			var key token.Key
			if known || i == 0 { // a key of each file on another curve says as much as all
				ok := false
				key, ok = keyOf(t, map[string]string{
					"kty": "EC", "crv": cmp.Or(curve.name, g.PublicKey.Curve), "x": number(t, g.PublicKey.WX, curve.size), "y": number(t, g.PublicKey.WY, curve.size),
				})
				if ok != known {
					t.Errorf("%s: a key on %s is published: %t", file, g.PublicKey.Curve, ok)
				}
			}
			for _, test := range g.Tests {
				// Every algorithm is tried that a header could name.
				taken := false
				for alg := range accepted {
					taken = taken || key.Verify(alg, bytesOf(t, test.Msg), bytesOf(t, test.Sig))
				}
				want := test.Result == "valid" && known && g.SHA == curve.hash
				c.judge(t, fmt.Sprintf("%s/%d", file, test.TcID), test.Comment, taken, want)
			}
		}
	}
	c.atLeast(t, 7548, 597)
}

// A signature in ASN.1, as certificates have it, is none in JOSE.
func TestV58_ECDSAInASN1(t *testing.T) {
	c := newTally(nil)
	for _, file := range []string{"ecdsa_secp256r1_sha256_test.json", "ecdsa_secp384r1_sha384_test.json", "ecdsa_secp521r1_sha512_test.json"} {
		var f signatureFile
		read(t, file, &f)
		for _, g := range f.TestGroups {
			curve := curves[g.PublicKey.Curve]
			key, ok := keyOf(t, map[string]string{
				"kty": "EC", "crv": curve.name, "x": number(t, g.PublicKey.WX, curve.size), "y": number(t, g.PublicKey.WY, curve.size),
			})
			if !ok {
				t.Fatalf("%s: a key on %s is left out", file, curve.name)
			}
			for _, test := range g.Tests {
				taken := key.Verify(curve.alg, bytesOf(t, test.Msg), bytesOf(t, test.Sig))
				c.judge(t, fmt.Sprintf("%s/%d", file, test.TcID), test.Comment, taken, false)
			}
		}
	}
	c.atLeast(t, 1530, 0)
}

// RSA signatures are taken as RS256 if they are PKCS #1 v1.5 over SHA-256, as PS256
// if they are PSS with SHA-256 in both places and a salt of 32 bytes, and if the key
// has 2048 bits at least. All others are refused, in files about other parameters
// too.
func TestV58_RSA(t *testing.T) {
	t.Parallel()
	const three = "Wycheproof calls the key's exponent of 3 acceptable, not valid; it is the issuer's to choose, and its signature is right"
	c := newTally(map[string]string{
		"rsa_pkcs1_2048_sig_gen_test.json/154": three,
		"rsa_pkcs1_2048_sig_gen_test.json/158": three,
		"rsa_pkcs1_3072_sig_gen_test.json/156": three,
	})
	files := append(names(t, "rsa_signature_*_test.json"), names(t, "rsa_pss_*_test.json")...)
	for _, file := range append(files, names(t, "rsa_pkcs1_*_sig_gen_test.json")...) {
		var f signatureFile
		read(t, file, &f)
		alg := "RS256"
		if strings.HasPrefix(file, "rsa_pss_") {
			alg = "PS256"
		}
		for _, g := range f.TestGroups {
			n, e := g.PublicKey.Modulus, g.PublicKey.PublicExponent
			if n == "" {
				n, e = g.PrivateKey.Modulus, g.PrivateKey.PublicExponent
			}
			key, ok := keyOf(t, map[string]string{"kty": "RSA", "n": number(t, n, 0), "e": number(t, e, 0)})
			ours := g.SHA == "SHA-256" && (alg == "RS256" || g.MGF == "MGF1" && g.MGFSHA == "SHA-256" && g.SLen == 32)
			for _, test := range g.Tests {
				want := ok && (ours && test.Result == "valid" || !ours && rightHere(alg, g.SHA, g.MGFSHA, test.Comment))
				taken := ok && key.Verify(alg, bytesOf(t, test.Msg), bytesOf(t, test.Sig))
				c.judge(t, fmt.Sprintf("%s/%d", file, test.TcID), test.Comment, taken, want)
			}
		}
	}
	c.atLeast(t, 9857, 388)
}

// rightHere is true of the signatures in files about other parameters that are
// wrong there because they have the parameters that are right here.
func rightHere(alg, sha, mgf, comment string) bool {
	if alg == "RS256" {
		return strings.HasPrefix(comment, "The message is hashed with SHA-256 instead of ")
	}
	return sha == "SHA-256" && mgf == "SHA-256" && comment == "s_len changed to 32"
}
