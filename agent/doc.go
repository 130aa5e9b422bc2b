// Package agent keeps one workload's identity alive: with a token file, the
// addresses of the CAs and a trust anchor file it obtains an X509-SVID, renews
// it for as long as it runs, follows the trust bundle, and publishes both to an
// [sds.Feed], from which package sds serves them.
//
// [Agent] is the main type; a [Host] has many of them, such as those of a node's
// pods, and one stream to the CA for all. Their promises are about bad days: a
// certificate in use stays until a new one has been verified; an outage of the
// CA shorter than half of a lifetime goes unseen; what is broken is said with
// the reason, and heals without a restart once the cause is gone.
//
// Private keys are made for each certificate and stay in memory. The package
// writes no file. It does not serve anything: that is package sds's. How a CA
// is asked is package agent/caclient's, and who asks for volumes agent/csi's.
package agent
