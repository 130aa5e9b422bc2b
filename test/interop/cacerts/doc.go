// Package cacerts makes certificate authorities as Istio's documentation has its users
// make them, by openssl, and runs our CA on them: what its clients are given is shown to
// programs and libraries that we did not write.
//
// [Make] is for other packages of tests, too.
package cacerts
