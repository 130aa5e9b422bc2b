// Package conf reads meshca's configuration files, strictly: a file is
// understood whole or the start stops. Every error names the file, the line and
// the key, since that is what the person who gets it at three in the morning
// has to look for.
//
// [Load] fills a struct whose fields carry `yaml` and `doc` tags; [Keys] lists
// the same fields for the reference documentation. The package knows no
// setting by itself.
package conf
