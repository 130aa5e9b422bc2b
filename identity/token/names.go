package token

import "strings"

// The rules by which Kubernetes names things. They are package identity's, so
// that a ServiceAccount that passes here has a SPIFFE ID; a fuzz target holds
// the two together.

// isLabel reports whether s is a DNS label.
func isLabel(s string) bool {
	return len(s) <= 63 && isDashed(s)
}

// isSubdomain reports whether s is dotted labels, bounded as a whole.
func isSubdomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !isDashed(label) {
			return false
		}
	}
	return true
}

func isDashed(s string) bool {
	for i := range len(s) {
		c := s[i]
		alnum := 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
		if !alnum && (c != '-' || i == 0 || i == len(s)-1) {
			return false
		}
	}
	return s != ""
}

// isUID reports whether s can be an object's UID. They are UUIDs, or for static
// pods a hash; all that counts is that one fits into a resource name and a log.
func isUID(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

// isPrintable reports whether s is at most 256 bytes of visible ASCII.
func isPrintable(s string) bool {
	if len(s) > 256 {
		return false
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
