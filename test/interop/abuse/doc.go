// Package abuse treats the CA's port as strangers on the network might: frames
// no library would send, floods, and silence. While it does, a good client has
// to be served.
package abuse
