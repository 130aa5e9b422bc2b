// Package budget keeps what callers of the CA make it ask the API server within
// bounds: a [Budget] lets so many requests a second and so many at once through,
// takes turns between nodes, and falls silent when the API server asks for that.
//
// It is for requests that somebody waits for. Lists and watches have client-go's
// own limits.
package budget
