package ca

import "time"

// Check holds the answer against the request, as [Authority.Run] does before it
// believes one. It is for an [Upstream] whose own state depends on whether what it
// was given is believed.
func (s *Signed) Check(req IntermediateRequest, now time.Time) error {
	_, err := checkSigned(s, req.TrustDomain, req.CSR.PublicKey, now)
	return err
}
