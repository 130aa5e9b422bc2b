package main

import (
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Requests a second of a part that has no limit of its own; twice as many at once.
// All that such a part does is a handful of requests every few seconds.
const partQPS = 20

// unlimited is for parts that count their requests themselves: client-go's default,
// of 5 a second, would be the limit then.
const unlimited = -1

// kubeClients are one for each part, since a limit is a queue: what is polled every
// few seconds must not wait behind a thousand writes. They share connections.
type kubeClients struct {
	state    kubernetes.Interface // and the anchors that it asks for
	lease    kubernetes.Interface // lost if it is not renewed within seconds
	trust    kubernetes.Interface // unlimited: trust.DefaultQPS is the limit
	policies dynamic.Interface
	keeper   dynamic.Interface
	told     dynamic.Interface // unlimited: events and status have limits of their own
}

func newKubeClients(api *rest.Config) (c kubeClients, err error) {
	for _, of := range []struct {
		into *kubernetes.Interface
		qps  float32
	}{{&c.state, partQPS}, {&c.lease, partQPS}, {&c.trust, unlimited}} {
		if *of.into, err = kubernetes.NewForConfig(paced(api, of.qps)); err != nil {
			return c, err
		}
	}
	for _, of := range []struct {
		into *dynamic.Interface
		qps  float32
	}{{&c.policies, partQPS}, {&c.keeper, partQPS}, {&c.told, unlimited}} {
		if *of.into, err = dynamic.NewForConfig(paced(api, of.qps)); err != nil {
			return c, err
		}
	}
	return c, nil
}

// paced is a configuration whose clients have a limit of their own.
func paced(api *rest.Config, qps float32) *rest.Config {
	c := rest.CopyConfig(api)
	c.QPS, c.Burst, c.RateLimiter = qps, int(2*qps), nil
	return c
}
