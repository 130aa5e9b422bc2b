package lint

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/meshca/meshca/policy"
	"github.com/meshca/meshca/policy/manifest"
)

// pods judges selectors by the pods that there are.
func (l *linter) pods(sorted []Policy) {
	if len(l.Pods) == 0 {
		return
	}
	matches := make([]int, len(sorted))
	lost := make([][]string, len(sorted)) // names of pods
	winner := make([]int, len(sorted))    // on the first of them
	for _, pod := range l.Pods {
		first := -1
		for i, p := range sorted {
			if pod.Namespace != p.Namespace || !policy.Matches(p.Selector, pod.Labels) {
				continue
			}
			matches[i]++
			if first < 0 {
				first = i
				continue
			}
			if len(lost[i]) == 0 {
				winner[i] = first
			}
			lost[i] = append(lost[i], pod.Name)
		}
	}
	for i, p := range sorted {
		switch first := sorted[winner[i]]; {
		case matches[i] == 0:
			l.find(p, "PL6", Ineffective, policy.Ref{}, "its selector matches none of the pods given for namespace %q", p.Namespace)
		case len(lost[i]) > 0:
			l.find(p, "PL3", Ineffective, first.Ref, "it is ignored, ports and all, on %s, which %s selects too: %s",
				names(lost[i]), first.Ref, policy.Why(first.Policy.Policy, p.Policy.Policy))
		}
	}
}

// names shows the first and counts the rest.
func names(pods []string) string {
	if len(pods) == 1 {
		return fmt.Sprintf("pod %q", pods[0])
	}
	return fmt.Sprintf("pod %q and %d more", pods[0], len(pods)-1)
}

// ports finds port-level modes under a number that only a Service has. They apply
// to the port that the pod listens on.
func (l *linter) ports(sorted []Policy) {
	for _, p := range sorted {
		if len(p.Ports) == 0 {
			continue
		}
		listening, services := l.behind(p)
		for _, port := range slices.Sorted(maps.Keys(p.Ports)) {
			if listening[port] {
				continue
			}
			for _, s := range services {
				if l.servicePort(p, s, port) {
					break
				}
			}
		}
	}
}

// behind returns the numbers that the policy's pods are known to listen on, and the
// Services that lead to them.
func (l *linter) behind(p Policy) (listening map[uint16]bool, services []manifest.Service) {
	listening = make(map[uint16]bool)
	for _, pod := range l.Pods {
		if pod.Namespace == p.Namespace && policy.Matches(p.Selector, pod.Labels) {
			for _, port := range pod.Ports {
				listening[port.Port] = true
			}
		}
	}
	for _, s := range l.Services {
		if s.Namespace != p.Namespace || !l.leadsTo(s, p) {
			continue
		}
		services = append(services, s)
		for _, port := range s.Ports {
			for _, target := range l.targets(p, s, port) {
				listening[target] = true
			}
		}
	}
	return listening, services
}

// leadsTo reports whether a Service has pods that the policy selects. Without pods
// that is certain only where one selector contains the other.
func (l *linter) leadsTo(s manifest.Service, p Policy) bool {
	if len(s.Selector) == 0 {
		return false
	}
	if len(l.Pods) == 0 {
		return policy.Matches(s.Selector, p.Selector) || policy.Matches(p.Selector, s.Selector)
	}
	return slices.ContainsFunc(l.Pods, func(pod manifest.Pod) bool { return l.isBehind(pod, s, p) })
}

func (l *linter) isBehind(pod manifest.Pod, s manifest.Service, p Policy) bool {
	return pod.Namespace == p.Namespace && policy.Matches(s.Selector, pod.Labels) && policy.Matches(p.Selector, pod.Labels)
}

// targets are the pods' ports that a Service's port leads to, none if they are not
// known.
func (l *linter) targets(p Policy, s manifest.Service, port manifest.ServicePort) []uint16 {
	if port.TargetName == "" {
		return []uint16{port.Target}
	}
	var found []uint16
	for _, pod := range l.Pods {
		if !l.isBehind(pod, s, p) {
			continue
		}
		for _, c := range pod.Ports {
			if c.Name == port.TargetName && !slices.Contains(found, c.Port) {
				found = append(found, c.Port)
			}
		}
	}
	slices.Sort(found)
	return found
}

// servicePort says that a number is one of the Service's, if it is.
func (l *linter) servicePort(p Policy, s manifest.Service, port uint16) bool {
	for _, sp := range s.Ports {
		if sp.Port != port {
			continue
		}
		targets := l.targets(p, s, sp)
		if len(targets) == 0 {
			l.not("PL4", fmt.Sprintf("whether port %d of policy %s is what its pods listen on: Service %q leads to the port named %q, and no Pod that has it is given", port, p.Ref, s.Name, sp.TargetName))
			return true
		}
		var numbers []string
		for _, target := range targets {
			numbers = append(numbers, fmt.Sprint(target))
		}
		l.find(p, "PL4", Ineffective, policy.Ref{}, "port %d is the port of Service %q; the pods behind it listen on %s: name that one",
			port, s.Name, strings.Join(numbers, ", "))
		return true
	}
	return false
}
