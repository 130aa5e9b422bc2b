// Package census is what one replica of the CA knows of each workload: since when a
// stream shows it, which bundle and policy it has acknowledged, what it refused, when
// its certificate ends, and what it was refused. A [Census] is in memory only, holds at
// most [Most] workloads and is told by package server.
//
// Being told costs a lock on a sixteenth of the workloads, and no memory for one that
// is known. Where there is no room, somebody without a stream is forgotten; if there is
// nobody such, the new one is not taken in, and [Census.Left] counts that.
//
// What it does not do: it judges nothing and tells nobody, and no certificate and no
// stream depends on it. Each replica knows only what went through it; package
// ca/kube/report hands that on.
package census
