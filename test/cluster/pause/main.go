// Pause holds a pod's namespaces open until it is told to end. As the first
// process of the pod it has no handler for SIGTERM unless it makes one.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, syscall.SIGINT)
	<-ended
}
