// Package installed is the list of what the chart and the manifest install, and how
// to tell an object of ours from one of somebody else that has its name.
//
// The namespaces are not in it: they hold the CA's root, and outlive an
// installation.
package installed
