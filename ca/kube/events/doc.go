// Package events writes Kubernetes events (events.k8s.io/v1) about pods and
// policies, where the people who own them look.
//
// A [Writer] never holds up who has something to say: what does not fit its queue,
// or comes too often, is dropped and counted. The same about the same object is one
// event with a count, written anew once a minute at most. An event is a hint and no
// record: it lives for an hour, and one that could not be written is not kept for
// later. Nothing here decides what is worth an event.
//
// # Permissions
//
//	events.events.k8s.io    create, patch    in the cluster
package events
