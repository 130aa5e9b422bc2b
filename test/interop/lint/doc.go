// Package lint judges certificates with zlint, by the rules that hold for every
// certificate (RFC 5280 and what updates it) and not those of the public web's
// certificate authorities, which SVIDs have no reason to follow.
package lint
