// Package audit writes the audit trail of the authority as JSON lines.
//
// The main type is [Log], a [ca.Auditor] over one sink: a file, a FIFO or the
// standard output. A record counts when the write to the sink has returned; the
// package does not sync files, rotate them, or keep a copy. It fails closed: a
// sink that is full, closed or stuck stops the signing, and says so.
package audit
