package apitest

import "time"

// Pod makes a pod that runs.
func Pod(namespace, name, uid, serviceAccount, node string) Object {
	return Object{
		"metadata": map[string]any{"namespace": namespace, "name": name, "uid": uid, "labels": map[string]any{"app": name}},
		"spec":     map[string]any{"serviceAccountName": serviceAccount, "nodeName": node},
		"status":   map[string]any{"phase": "Running"},
	}
}

// Named makes an object of which only the metadata matters.
func Named(namespace, name, uid string) Object {
	m := map[string]any{"name": name, "uid": uid}
	if namespace != "" {
		m["namespace"] = namespace
	}
	return Object{"metadata": m}
}

// InPhase returns the pod in a phase.
func (o Object) InPhase(phase string) Object {
	next := o.copied()
	next["status"] = map[string]any{"phase": phase}
	return next
}

// Deleting returns the object with a deletionTimestamp.
func (o Object) Deleting(at time.Time) Object {
	next := o.copied()
	m := map[string]any{}
	for k, v := range o["metadata"].(map[string]any) {
		m[k] = v
	}
	m["deletionTimestamp"] = at.UTC().Format(time.RFC3339)
	next["metadata"] = m
	return next
}

func (o Object) copied() Object {
	next := Object{}
	for k, v := range o {
		next[k] = v
	}
	return next
}
