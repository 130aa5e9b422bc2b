package caclient

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"time"
)

// Claims are what a ServiceAccount token says of itself. Nothing of it has been
// verified, which only the CA can do: they are good for finding a mistake before
// the CA is asked, and for nothing else.
type Claims struct {
	Namespace, ServiceAccount string
	PodName, PodUID           string // empty where it is bound to no pod
	NodeName                  string // empty where it names no node
	Expires                   time.Time
}

// ReadClaims reads a token's claims. Its errors hold no part of the token.
func ReadClaims(token string) (Claims, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 || len(token) > maxToken {
		return Claims{}, errors.New("it is not a JWT of at most 8 KiB")
	}
	type object struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	}
	var raw struct {
		Expires float64 `json:"exp"`
		Kube    struct {
			Namespace      string `json:"namespace"`
			ServiceAccount object `json:"serviceaccount"`
			Pod            object `json:"pod"`
			Node           object `json:"node"`
		} `json:"kubernetes.io"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &raw) != nil {
		return Claims{}, errors.New("its claims cannot be read")
	}
	c := Claims{
		Namespace: raw.Kube.Namespace, ServiceAccount: raw.Kube.ServiceAccount.Name,
		PodName: raw.Kube.Pod.Name, PodUID: raw.Kube.Pod.UID, NodeName: raw.Kube.Node.Name,
	}
	if raw.Expires > 0 && raw.Expires < 1<<38 {
		c.Expires = time.Unix(int64(raw.Expires), 0)
	}
	return c, nil
}
