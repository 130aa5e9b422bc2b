// Package lint says which policies would be refused, and which would be accepted
// and have no effect: because another one wins, because they select nothing, or
// because they name a port that no pod listens on.
//
// [Run] is its one entry and is pure. Rules PV and PA are judged by package
// manifest; the rules here are PL1 to PL6. What cannot be judged without Services
// or Pods is named as not checked when there are none.
package lint
