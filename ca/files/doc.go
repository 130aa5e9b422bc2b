// Package files is the upstream authority that an operator gives as files: a root, or
// an intermediate with its chain. Istio's Secret cacerts is taken as it is, and so is
// one of type kubernetes.io/tls, as cert-manager writes it.
//
// An [Upstream] signs our intermediates with the key that it was given. Where the given
// certificate allows no authority below it, as Istio's own recipe makes it, it hands
// the key on, and the replicas sign leaves with that.
//
// The files are a set: they are read as one, judged as one, and replaced as one. What
// is wrong with a new set refuses all of it, with the file and the reason, and the set
// before goes on from memory. That holds for as long as the process does: a replica
// that starts has nothing to go on with, and refuses to start.
//
// The package does not decide which roots the mesh can do without; Config.Judge does.
// It writes nothing, and asks nobody for certificates.
package files
