package manifest

import (
	"math"
	"strconv"

	"go.yaml.in/yaml/v3"
)

// Pod is what a policy's selector and ports can be about.
type Pod struct {
	Namespace, Name string
	Labels          map[string]string
	Ports           []ContainerPort
}

// ContainerPort is a port that a container says it listens on.
type ContainerPort struct {
	Name string
	Port uint16
}

// Service maps the numbers that clients use to those that pods listen on.
type Service struct {
	Namespace, Name string
	Selector        map[string]string
	Ports           []ServicePort
}

// ServicePort is one of a Service's ports.
type ServicePort struct {
	Port uint16
	// Target is the pods' port, or 0 where TargetName names it.
	Target     uint16
	TargetName string
}

type metadata struct {
	Namespace string            `yaml:"namespace"`
	Name      string            `yaml:"name"`
	Labels    map[string]string `yaml:"labels"`
}

func (m metadata) namespace() string {
	if m.Namespace == "" {
		return "default"
	}
	return m.Namespace
}

func (c *Contents) addPod(n *yaml.Node) error {
	var pod struct {
		Metadata metadata `yaml:"metadata"`
		Spec     struct {
			Containers []struct {
				Ports []struct {
					Name          string `yaml:"name"`
					ContainerPort uint16 `yaml:"containerPort"`
				} `yaml:"ports"`
			} `yaml:"containers"`
		} `yaml:"spec"`
	}
	if err := n.Decode(&pod); err != nil {
		return syntax(err)
	}
	p := Pod{Namespace: pod.Metadata.namespace(), Name: pod.Metadata.Name, Labels: pod.Metadata.Labels}
	for _, container := range pod.Spec.Containers {
		for _, port := range container.Ports {
			p.Ports = append(p.Ports, ContainerPort{port.Name, port.ContainerPort})
		}
	}
	c.Pods = append(c.Pods, p)
	return nil
}

func (c *Contents) addService(n *yaml.Node) error {
	var service struct {
		Metadata metadata `yaml:"metadata"`
		Spec     struct {
			Selector map[string]string `yaml:"selector"`
			Ports    []struct {
				Port       uint16    `yaml:"port"`
				TargetPort yaml.Node `yaml:"targetPort"`
			} `yaml:"ports"`
		} `yaml:"spec"`
	}
	if err := n.Decode(&service); err != nil {
		return syntax(err)
	}
	s := Service{Namespace: service.Metadata.namespace(), Name: service.Metadata.Name, Selector: service.Spec.Selector}
	for _, port := range service.Spec.Ports {
		p := ServicePort{Port: port.Port, Target: port.Port}
		if t := port.TargetPort; t.Kind != 0 && !isNull(&t) {
			p.Target = 0
			if number, err := strconv.ParseUint(t.Value, 10, 64); err != nil {
				p.TargetName = t.Value
			} else if number <= math.MaxUint16 {
				p.Target = uint16(number)
			}
		}
		s.Ports = append(s.Ports, p)
	}
	c.Services = append(c.Services, s)
	return nil
}
