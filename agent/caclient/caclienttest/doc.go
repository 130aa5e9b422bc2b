// Package caclienttest stands in for the CAs that package caclient talks to: a
// small gRPC server with a real CA behind it ([CA]) that can be told to
// misbehave, and a network in memory ([Network]) whose addresses can be made to
// refuse, to swallow or to say nothing. Both run inside a testing/synctest
// bubble.
//
// What a CA must refuse is not tested here: it believes every token.
package caclienttest
