// Package cluster runs a real Kubernetes of one node on this machine, without a
// container engine: etcd, the API server, the controller manager, the scheduler,
// kubelet and kube-proxy as processes, containerd and runc under them, CoreDNS and
// everything else as pods.
//
// [Up] brings it up and [Cluster.Down] takes it away. It lives in a network
// namespace of its own, so that neither its addresses nor its rules meet those of
// the machine, and in one directory. Its processes outlive the program that
// started them; each is known by its process id and the instant of its start, and
// is ended by those.
//
// Images are made here, from static binaries; no registry is asked. See [Image].
//
// It knows nothing of meshca: what runs in the cluster is for the tests in
// test/cluster/e2e.
package cluster
