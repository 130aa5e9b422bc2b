// Package state keeps the CA's root and the state that its replicas share in a
// Kubernetes namespace. [Store] is a [ca.Upstream]: it signs intermediates with
// the root that the shared state calls active.
//
// # Objects
//
//	Secret    meshca-root-<n>  root n, counted from 1: root.pem and root.key, immutable
//	ConfigMap meshca-roots     the marker: fingerprints of all roots that there have ever
//	                           been, and the highest sequence and epoch seen
//	ConfigMap meshca-state     the shared state: bundle, sequence, active root, step, epoch
//
// Roots are numbered and not named after their keys, because a name that all
// replicas know beforehand lets the API server decide: of any number that create
// meshca-root-1 exactly one succeeds, whatever was lost on the way to whom. There
// is no claim that somebody might hold and die with, and no Secret has to be
// looked for, so nobody needs to list them. A Secret is never deleted by us.
//
// # Order of writes
//
// Nothing is signed before all of them have happened. Each is a create that fails
// where the object exists, and after each the objects are read again: what the
// API server holds counts, never what a replica believes to have written.
//
//	read: no marker, no state, no root 2
//	  1 create Secret meshca-root-1    this is the instant at which the root exists
//	  2 create the marker
//	  3 create the state
//	  4 raise the marker's epoch to the state's
//
//	died after, or answer lost   is there               who comes next
//	nothing                      nothing                makes the root
//	1                            root 1                 uses root 1: nothing was signed with it
//	2                            root 1, marker         makes the state that the marker implies
//	3                            all; marker's epoch 0  raises the marker
//	4                            all                    signs
//
// A create that was executed although its answer was lost looks like row 1 to 4
// to its own sender too. One that is executed late, after somebody else's, fails
// at the API server.
//
//	is missing                   means                  so
//	marker; state is there       it was deleted         refused: meshca restore
//	marker; root 2 is there      it was deleted         refused: meshca restore
//	a root of the marker         its key is lost        refused: meshca restore
//	state; one root, sequence 1  see row 2              made: it says no more than the marker
//	state; otherwise             it was deleted         refused: meshca restore
//	marker and state; root 1     row 1                  root 1 at sequence 1: its bundle had no other,
//	  is there, root 2 not                              since a change of it begins with root 2
//	all, and an anchor is there  the namespace was lost refused: meshca restore
//
// The last row is about what is outside of the namespace, see [Config.Anchors]; it
// goes for row 1, too, unless the anchor is of exactly that root. Who gives a mesh
// up on purpose deletes its anchors.
//
// Later writes go to the state first and to the marker next, and the marker is
// read first and the state next. So a state that is behind the marker is an older
// one that somebody put there, and is refused.
//
// # While running
//
// Each replica holds roots, marker and state in memory, and looks at all of them
// every 5 s. What was deleted is created again from memory. A marker or state that
// is damaged or older is put back. A Secret with other content cannot be put back
// without a permission to delete; it is reported until somebody deletes it, and is
// then created again. What is of another trust domain or of a newer program is
// reported and left alone. A replica whose memory is behind the marker puts
// nothing back. None of this ever makes a root.
//
// So the root's key is in the memory of every replica, unlike with a root in a
// directory (ca/self), which is read for each signature: the copy is what brings a
// deleted Secret back.
//
// # Permissions
//
// A Role in the CA's own namespace, where nothing else should live:
//
//	secrets     create
//	secrets     get          resourceNames meshca-root-1, meshca-root-2, …
//	configmaps  create
//	configmaps  get, update  resourceNames meshca-roots, meshca-state
//
// No list, watch, patch or delete. A create cannot be restricted by name. The
// Role must name one root more than there are: that it is not there is looked up.
package state
