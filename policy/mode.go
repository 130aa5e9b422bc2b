package policy

import "fmt"

// Mode is what a policy says, or what was decided, about a port. The zero value
// is Strict, and so is every value that this version does not know: what was
// forgotten or is new never opens a port.
type Mode uint8

const (
	Strict     Mode = iota // mutual TLS or nothing
	Permissive             // mutual TLS, or whatever else comes
	Disable                // bytes; mutual TLS is not terminated
	Unset                  // the next wider policy decides; never the mode of a [Result]
	Unknown                // a mode of a newer version; resolves to Strict, with a warning
)

// ParseMode reads a mode as it is written in a PeerAuthentication. An empty text
// is Unset. For a text that it does not know it returns Unknown and false.
func ParseMode(s string) (mode Mode, ok bool) {
	switch s {
	case "", "UNSET":
		return Unset, true
	case "DISABLE":
		return Disable, true
	case "PERMISSIVE":
		return Permissive, true
	case "STRICT":
		return Strict, true
	}
	return Unknown, false
}

// String returns the mode as it is written in a PeerAuthentication.
func (m Mode) String() string {
	switch m {
	case Strict:
		return "STRICT"
	case Permissive:
		return "PERMISSIVE"
	case Disable:
		return "DISABLE"
	case Unset:
		return "UNSET"
	case Unknown:
		return "UNKNOWN"
	}
	return fmt.Sprintf("UNKNOWN(%d)", uint8(m))
}

// MarshalText returns [Mode.String].
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

func (m Mode) known() bool { return m < Unknown }

// over overlays m, said by the narrower policy, on base, said by the wider ones.
func (m Mode) over(base Mode) Mode {
	switch m {
	case Unset:
		return base
	case Permissive, Disable:
		return m
	}
	return Strict
}
