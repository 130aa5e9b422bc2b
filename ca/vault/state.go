package vault

import "time"

// State is how Vault is, as far as this CA is concerned.
type State string

// The states. All but OK mean that no intermediate can be had now.
const (
	OK            State = "ok"
	Connecting    State = "connecting"    // nothing has been heard of it yet
	Sealed        State = "sealed"        // it runs, and somebody must unseal it
	Standby       State = "standby"       // no server is active, or none forwards to the one that is
	Uninitialised State = "uninitialised" // it has never been set up
	Expired       State = "expired"       // what the CA logs in with, or its token, is no longer good
	Forbidden     State = "forbidden"     // a login is good, and what is asked is not allowed
	Slow          State = "slow"          // it is there and does not answer in time
	Unreachable   State = "unreachable"   // no connection, or one that breaks
	Refused       State = "refused"       // it refuses what is asked, or its answer is not believed
)

// States are all of them, in the order of the documentation.
func States() []State {
	return []State{OK, Connecting, Sealed, Standby, Uninitialised, Expired, Forbidden, Slow, Unreachable, Refused}
}

// fault is what is wrong now.
type fault struct {
	err   *Error
	since time.Time
	// signing says that it showed in a request for a signature, and that only another
	// one can tell whether it is over.
	signing bool
}

// pause is a growing time between attempts: at most 5 s after the first failure, and
// twice as much after each further one, up to 5 min. Full jitter keeps replicas that
// failed together from coming back together.
func (u *Upstream) pause(failures int) time.Duration {
	bound := min(firstPause<<min(max(failures-1, 0), 6), longestPause)
	return max(time.Duration(u.random()*float64(bound)), shortestPause)
}

// spacing is a growing time between logins that succeed and help nothing, with less
// jitter: they follow upon requests, and short pauses in a row would be a storm.
func (u *Upstream) spacing(logins int) time.Duration {
	bound := min(firstPause<<min(max(logins-1, 0), 6), longestPause)
	return bound*2/3 + time.Duration(u.random()*float64(bound)/3)
}
