package wire

import (
	"strconv"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// answers are the responses of a stream that the client has not answered yet.
type answers struct {
	most   int    // that are remembered, for a client that never answers
	nonce  uint64 // of the last response
	oldest uint64 // at most that of the oldest that is remembered
	open   map[uint64]response
}

type response struct{ name, version string } // of its resource; both empty if it has none

func newAnswers(most int) answers {
	return answers{most: most, open: make(map[uint64]response)}
}

// expect gives a response that is about to be sent its nonce.
func (a *answers) expect(name, version string) (nonce string) {
	for len(a.open) >= a.most {
		delete(a.open, a.oldest)
		a.oldest++
	}
	a.nonce++
	if len(a.open) == 0 {
		a.oldest = a.nonce
	}
	a.open[a.nonce] = response{name, version}
	return strconv.FormatUint(a.nonce, 10)
}

// settle finds the response that a request answers, and its number. Ok is false if
// it answers none; awaited is false if it answers one that is not open.
func (a *answers) settle(req *discovery.DeltaDiscoveryRequest) (r response, number uint64, awaited, ok bool) {
	nonce := req.GetResponseNonce()
	if nonce == "" {
		return response{}, 0, false, false
	}
	n, err := strconv.ParseUint(nonce, 10, 64)
	if err != nil {
		return response{}, 0, false, true
	}
	r, awaited = a.open[n]
	delete(a.open, n)
	return r, n, awaited, true
}

// settleBefore gives up all responses before one.
func (a *answers) settleBefore(number uint64) {
	for ; a.oldest < number && len(a.open) > 0; a.oldest++ {
		delete(a.open, a.oldest)
	}
}
