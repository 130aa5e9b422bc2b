// Package canary runs the two real programs at their most talkative, down the
// golden path and every error path that can be provoked from outside, and then
// looks for tokens and private keys in all that they wrote, and for ports in all
// that they opened.
package canary
