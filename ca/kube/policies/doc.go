// Package policies says what PeerAuthentication holds for each pod, from the API
// server.
//
// [Source] is what package server asks. It follows all PeerAuthentications of the
// cluster, and asks [Pods] for the labels that each pod has now. What was known
// stays when the API server is away; what was never known is STRICT for those who
// never had a policy.
//
// A decision has two versions. That of the policies is the resourceVersion up to
// which the watch is known to have told everything: of the last list, event or
// bookmark. Only changes are pushed, and only to the pods of the namespaces that had
// one, also if it was taken back meanwhile; to all where the root namespace had one, or
// all was listed anew. Whoever is not told has had no change up to the new number: any
// replica says the same of it under all numbers in between, so none can take it back. The
// risen number is told with whatever is sent next. It means that replicas which have come equally
// far name equal numbers, however long they run, so that a label's change is not
// refused for the number of the policies beside it: a replica that has just listed
// names a higher one than others do, until their next bookmark, which comes each
// minute. Numbers of one replica never fall. Where the API server's do, its etcd was
// restored from a backup without --bump-revision: what was in force stays until they
// have risen above it again.
//
// Versions of policies in files (package filepolicy) are milliseconds of the clock,
// which no API server counts to. So where a CA changes from files to a cluster, agents
// that hold a policy keep it until they restart.
//
// # A definition that is deleted
//
// With the definition (CustomResourceDefinition) of PeerAuthentication the API server
// deletes all policies, which nobody means. So policies that disappear count only when
// a look at the definition, made after that, shows the one under which they were
// known, and not about to go. If it is gone, or going, what was in force stays, all of
// it: nothing else counts meanwhile. If there is another one, with fewer policies than
// there were, it stays too, and a replica that starts then knows no policies: running
// proxies keep theirs, new ones are STRICT.
// That ends when there are as many policies again, or when whoever means it says so, by
// the annotation [AcceptAnnotation] on the definition with its UID as value. How many
// there were, under which definition, is in the ConfigMap [RecordName]; see
// [Source.Remember].
//
// # Permissions
//
//	peerauthentications.security.istio.io    list, watch    in the cluster
//	customresourcedefinitions                get            peerauthentications.security.istio.io
//	configmaps                               get, update    meshca-policies, in the CA's namespace
//	configmaps                               create         in the CA's namespace (for Remember)
//
// What an object says is read by package manifest, as if it stood in a file. An object
// that the API server let in, and that is not understood whole, is STRICT for what it
// selects.
package policies
