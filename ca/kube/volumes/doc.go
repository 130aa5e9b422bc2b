// Package volumes tells which pods have a volume of meshca's CSI driver, which is
// what gives a pod its identity.
//
// [Each] goes through all pods of a cluster, page by page; [Users] are those that
// need an agent on their node: for their socket while they run, and for the
// kubelet to be able to take the volume away when they end. It needs list on pods.
package volumes
