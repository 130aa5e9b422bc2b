// Package csi is the node agent's door to the kubelet: a CSI node plugin whose
// volumes are folders with one socket in them, on which a pod gets its identity.
//
// [Plugin] is the main type. The kubelet tells it with each volume which pod
// wants it, and hands it a token of that pod's ServiceAccount; the plugin makes
// the folder, binds agent.sock in it, and has an [agent.Host] keep the identity.
// Nothing is mounted, and no privilege is needed beyond writing to the kubelet's
// folder: the kubelet and the container runtime mount the folder into the pod,
// and that mount is what says who the caller is.
//
// Volumes, and each pod's last token, lie in a folder in memory, so that an
// agent that was killed serves the same sockets again before the kubelet has
// noticed. Private keys lie nowhere.
//
// The package believes the kubelet, as the node does, and checks that what it
// says fits together. It verifies no token: that is the CA's.
package csi
