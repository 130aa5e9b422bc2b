package arch

import (
	"fmt"
	"go/version"
)

// checkGoFloor says whether a Go release, such as "go1.26.8", is new enough
// for the floor that a go.mod names, such as "1.26.8". Below it lie known holes
// in crypto/tls and crypto/x509.
func checkGoFloor(have, floor string) error {
	if !version.IsValid("go" + floor) {
		return fmt.Errorf("%q is no Go version", floor)
	}
	if version.IsValid(have) && version.Compare(have, "go"+floor) < 0 {
		return fmt.Errorf("this is %s; the pinned floor is go%s: use that or newer", have, floor)
	}
	return nil
}
