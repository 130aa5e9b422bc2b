package kubetest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// RestartAPIServer starts the API server again where it was, after it was killed,
// and waits until it is ready. No other method may be called meanwhile.
func (c *Cluster) RestartAPIServer(ctx context.Context) error {
	if err := c.startAPIServer(); err != nil {
		return err
	}
	return c.waitReady(ctx)
}

// RestartEtcd starts etcd again with what it had, after it was killed. No other
// method may be called meanwhile.
func (c *Cluster) RestartEtcd(ctx context.Context) error {
	if err := c.startEtcd(); err != nil {
		return err
	}
	return c.waitReady(ctx)
}

// Compact has etcd forget all that is older than now.
func (c *Cluster) Compact(ctx context.Context) error {
	var now struct {
		Header struct {
			Revision string `json:"revision"`
		} `json:"header"`
	}
	// Any read says which revision this is.
	answer, err := c.askEtcd(ctx, "/v3/kv/range", `{"key":"AA=="}`)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(answer, &now); err != nil {
		return fmt.Errorf("reading etcd's revision: %w", err)
	}
	_, err = c.askEtcd(ctx, "/v3/kv/compaction", `{"revision":"`+now.Header.Revision+`","physical":true}`)
	return err
}

func (c *Cluster) askEtcd(ctx context.Context, path, body string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.etcdURL+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("etcd answered %s to %s: %s", resp.Status, path, answer)
	}
	return answer, nil
}
