// Package definition keeps the API server's definition (CustomResourceDefinition) of
// PeerAuthentication: it makes one where there is none, and one of its own newer
// where it has become older than this program.
//
// [Keeper.Run] is for the replica that leads. A definition of somebody else, Istio's
// above all, is never changed, and none is ever deleted. Two that make one at the same
// time are arbitrated by the API server. The definition is written by us, and takes and
// refuses the same objects as Istio's.
//
// # Permissions
//
//	customresourcedefinitions.apiextensions.k8s.io    get, update    peerauthentications.security.istio.io
//	customresourcedefinitions.apiextensions.k8s.io    create         in the cluster
package definition
