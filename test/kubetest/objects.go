package kubetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// object is any Kubernetes object, or a part of one.
type object map[string]any

// StatusError is an answer of the API server other than success.
type StatusError struct {
	Method, Path string
	Code         int
	Body         string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s %s: the API server answered %d: %s", e.Method, e.Path, e.Code, e.Body)
}

// Get returns the body of any path of the API server, as administrator.
func (c *Cluster) Get(ctx context.Context, path string) ([]byte, error) {
	return c.do(ctx, http.MethodGet, path, nil)
}

// JWKS returns the keys that the API server's tokens are signed with.
func (c *Cluster) JWKS(ctx context.Context) ([]byte, error) {
	return c.Get(ctx, "/openid/v1/jwks")
}

// CreateNamespace makes a namespace; one that exists already is fine.
func (c *Cluster) CreateNamespace(ctx context.Context, name string) error {
	_, err := c.create(ctx, "/api/v1/namespaces", object{"metadata": object{"name": name}})
	var status *StatusError
	if errors.As(err, &status) && status.Code == http.StatusConflict {
		return nil
	}
	return err
}

// CreateServiceAccount returns the UID of the new ServiceAccount.
func (c *Cluster) CreateServiceAccount(ctx context.Context, namespace, name string) (uid string, err error) {
	return c.create(ctx, inNamespace(namespace, "serviceaccounts"), object{"metadata": object{"name": name}})
}

// CreateNode returns the UID of the new Node.
func (c *Cluster) CreateNode(ctx context.Context, name string) (uid string, err error) {
	return c.create(ctx, "/api/v1/nodes", object{"metadata": object{"name": name, "labels": object{"kubernetes.io/os": "linux"}}})
}

// CreatePod returns the UID of a pod that runs, as far as objects go, under
// the ServiceAccount on the node.
func (c *Cluster) CreatePod(ctx context.Context, namespace, name, serviceAccount, node string) (uid string, err error) {
	return c.create(ctx, inNamespace(namespace, "pods"), object{
		"metadata": object{"name": name},
		"spec": object{
			"serviceAccountName":           serviceAccount,
			"automountServiceAccountToken": false,
			"nodeName":                     node,
			"containers":                   []object{{"name": "app", "image": "none"}},
		},
	})
}

// DeletePod removes a pod at once.
func (c *Cluster) DeletePod(ctx context.Context, namespace, name string) error {
	path := inNamespace(namespace, "pods") + "/" + url.PathEscape(name) + "?gracePeriodSeconds=0"
	_, err := c.do(ctx, http.MethodDelete, path, nil)
	return err
}

// TokenRequest is what to ask the TokenRequest API for.
type TokenRequest struct {
	// Audiences are the API server's own if there are none.
	Audiences []string
	// Seconds of validity, at least 600; the API server may give more or
	// less. 0 leaves it to the API server.
	Seconds int64
	// PodName and PodUID bind the token to a pod. An empty PodUID is filled
	// in by the API server; no PodName makes an unbound token.
	PodName, PodUID string
}

// Token returns a token of the ServiceAccount, as the kubelet would get it.
func (c *Cluster) Token(ctx context.Context, namespace, serviceAccount string, r TokenRequest) (string, error) {
	spec := object{"audiences": append([]string{}, r.Audiences...)}
	if r.Seconds != 0 {
		spec["expirationSeconds"] = r.Seconds
	}
	if r.PodName != "" {
		spec["boundObjectRef"] = object{"apiVersion": "v1", "kind": "Pod", "name": r.PodName, "uid": r.PodUID}
	}
	path := inNamespace(namespace, "serviceaccounts") + "/" + url.PathEscape(serviceAccount) + "/token"
	body, err := c.do(ctx, http.MethodPost, path, object{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec,
	})
	if err != nil {
		return "", err
	}
	var answer struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return "", fmt.Errorf("reading the answer to a TokenRequest: %w", err)
	}
	return answer.Status.Token, nil
}

func inNamespace(namespace, resource string) string {
	return "/api/v1/namespaces/" + url.PathEscape(namespace) + "/" + resource
}

func (c *Cluster) create(ctx context.Context, path string, o object) (uid string, err error) {
	body, err := c.do(ctx, http.MethodPost, path, o)
	if err != nil {
		return "", err
	}
	var made struct {
		Metadata struct {
			UID string `json:"uid"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(body, &made); err != nil {
		return "", fmt.Errorf("reading what POST %s made: %w", path, err)
	}
	return made.Metadata.UID, nil
}

// CreateYAML posts an object as a person wrote it. The path may carry a query, such
// as dryRun=All.
func (c *Cluster) CreateYAML(ctx context.Context, path string, object []byte) error {
	_, err := c.send(ctx, http.MethodPost, path, "application/yaml", bytes.NewReader(object))
	return err
}

func (c *Cluster) do(ctx context.Context, method, path string, in object) ([]byte, error) {
	var body io.Reader
	if in != nil {
		encoded, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", method, path, err)
		}
		body = bytes.NewReader(encoded)
	}
	return c.send(ctx, method, path, "application/json", body)
}

func (c *Cluster) send(ctx context.Context, method, path, contentType string, body io.Reader) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", contentType)
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode >= 300 {
		return nil, &StatusError{Method: method, Path: path, Code: resp.StatusCode, Body: string(answer)}
	}
	return answer, nil
}

// Create posts an object and returns its UID.
func (c *Cluster) Create(ctx context.Context, path string, o map[string]any) (uid string, err error) {
	return c.create(ctx, path, o)
}

// Update puts an object in the place of the one at a path.
func (c *Cluster) Update(ctx context.Context, path string, o map[string]any) error {
	_, err := c.do(ctx, http.MethodPut, path, o)
	return err
}

// Delete removes the object at a path, which may carry a query.
func (c *Cluster) Delete(ctx context.Context, path string) error {
	_, err := c.do(ctx, http.MethodDelete, path, nil)
	return err
}

// MergePatch changes the object at a path.
func (c *Cluster) MergePatch(ctx context.Context, path string, o map[string]any) error {
	body, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("PATCH %s: %w", path, err)
	}
	_, err = c.send(ctx, http.MethodPatch, path, "application/merge-patch+json", bytes.NewReader(body))
	return err
}
