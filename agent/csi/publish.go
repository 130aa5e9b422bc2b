package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/caclient"
)

// NodePublishVolume makes a volume, or brings one that is there a fresh token.
// The kubelet calls it twice at the beginning, and then about every 80 s.
func (n *node) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if !isVolumeID(req.GetVolumeId()) {
		return nil, status.Error(codes.InvalidArgument, "the volume's ID is empty, too long or not printable")
	}
	release, err := n.locks.acquire(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer release()
	v := n.volume(req.GetVolumeId())
	if v != nil && v.published && v.claim.target.path == req.GetTargetPath() {
		n.republish(v, req)
		return &csi.NodePublishVolumeResponse{}, nil
	}
	c, err := n.readClaim(req)
	if err != nil {
		return nil, err
	}
	if v != nil && *v.claim != *c {
		return nil, status.Errorf(codes.InvalidArgument, "the volume %.128q is that of pod %s at %q already", c.id, v.claim.who(), v.claim.target.path)
	}
	token, err := readToken(c, req)
	if err != nil {
		return nil, err
	}
	if err := n.publish(ctx, v, c, token); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// republish replaces the token, and fails never: the pod runs, and an error here
// would only become an event every 80 s. What is wrong with the request stands in
// the log.
func (p *Plugin) republish(v *volume, req *csi.NodePublishVolumeRequest) {
	log := v.log
	token, err := readToken(v.claim, req)
	if err != nil {
		log.Error("the kubelet brought no new token; the last one is used until it ends", "reason", status.Convert(err).Message())
		return
	}
	if v.setToken(token) {
		p.save(v)
		v.agent.Refresh()
		log.Debug("the kubelet brought a new token")
	}
	if v.running() {
		return
	}
	v.cancel() // it has ended; this lets go of its context
	fresh := p.newVolume(v.claim, token)
	fresh.published, fresh.made = v.published, v.made
	// Until that succeeds the old one stays known: a volume that was forgotten would
	// be published as a new one, which may fail.
	if err := p.bind(fresh); err != nil {
		log.Error("a volume cannot be served again", "reason", err.Error())
		return
	}
	fresh.run()
}

// make writes a volume down, makes its folder and socket, and serves it. It is
// written down first: should we end in the middle, the next process knows
// whose the folder is.
func (p *Plugin) make(c *claim, token string) (*volume, error) {
	if err := p.admit(c); err != nil {
		return nil, err
	}
	parent, err := p.pods.open(c.target)
	if err != nil {
		return nil, makeError(c, err)
	}
	defer func() { _ = parent.Close() }() // it was only read
	there, err := exists(parent)
	if err != nil {
		return nil, makeError(c, err)
	}
	v := p.newVolume(c, token)
	v.made = !there
	p.save(v)
	if err = makeFolder(parent); err == nil {
		err = p.bind(v)
	}
	if err != nil {
		p.takeBack(v)
		return nil, makeError(c, err)
	}
	v.run()
	return v, nil
}

// publish makes the folder and the socket, unless v is there from an earlier
// try, and waits for the first certificate.
func (p *Plugin) publish(ctx context.Context, v *volume, c *claim, token string) error {
	began := time.Now()
	var err error
	if v == nil {
		if v, err = p.make(c, token); err != nil {
			return err
		}
	} else if v.setToken(token) {
		v.agent.Refresh()
	}
	wait, cancel := context.WithTimeout(ctx, firstSVIDWait)
	defer cancel()
	err = v.agent.First(wait)
	var denied *agent.DeniedError
	switch {
	case err == nil:
		took := time.Since(began)
		p.metrics.first.Observe(took.Seconds())
		v.log.Info("volume published", "spiffe_id", c.spiffeID.String(), "took", took.Round(100*time.Microsecond).String())
	case errors.As(err, &denied):
		p.stop(v)
		p.takeBack(v)
		return refusal(c, denied)
	case ctx.Err() != nil:
		// The kubelet has given up on this call, and makes another one.
		return status.FromContextError(ctx.Err()).Err()
	default:
		v.log.Warn("volume published without a certificate; the pod's programs wait for it", "spiffe_id", c.spiffeID.String(), "reason", reasonOf(v))
	}
	v.published = true
	p.save(v)
	return nil
}

// reasonOf says why a volume has no certificate yet.
func reasonOf(v *volume) string {
	if err := v.agent.Ready(); err != nil {
		return err.Error()
	}
	return ""
}

// takeBack removes what a first publish has made; what was there before stays,
// since a container may have it mounted.
func (p *Plugin) takeBack(v *volume) {
	err := p.store.remove(v.claim.id)
	if v.made {
		err = errors.Join(err, p.pods.remove(v.claim.target))
	}
	if err != nil {
		v.log.Error("a volume that came to nothing cannot be taken back whole", "reason", err.Error())
	}
}

// makeError says to the kubelet why a folder or socket could not be made.
func makeError(c *claim, err error) error {
	code := codes.Internal
	if errors.Is(err, errNotFolder) {
		code = codes.InvalidArgument
	} else if errors.Is(err, fs.ErrNotExist) {
		code = codes.FailedPrecondition
	}
	return status.Errorf(code, "making the folder of volume %q of pod %s: %v", c.target.volume, c.who(), err)
}

// refusal is what stands in the pod's FailedMount event when the CA will not
// have it.
func refusal(c *claim, denied *agent.DeniedError) error {
	var refused *caclient.RefusedError
	if !errors.As(denied, &refused) {
		return status.Errorf(codes.PermissionDenied, "no identity for pod %s: asked for %s, but %v", c.who(), c.spiffeID, denied)
	}
	return status.Errorf(codes.PermissionDenied, "the CA refuses pod %s (%s) an identity: %v, %q; the log of meshca in meshca-system has the reason under that ref",
		c.who(), c.spiffeID, refused.Code, refused.Message)
}

// NodeUnpublishVolume takes a volume away. It may be unknown: an agent that lost
// its state must not keep a pod from ending.
func (n *node) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if !isVolumeID(req.GetVolumeId()) {
		return nil, status.Error(codes.InvalidArgument, "the volume's ID is empty, too long or not printable")
	}
	t, err := n.pods.parse(req.GetTargetPath())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	release, err := n.locks.acquire(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer release()
	if v := n.volume(req.GetVolumeId()); v != nil {
		if v.claim.target != t {
			return nil, status.Errorf(codes.InvalidArgument, "the volume %.128q is at %q", v.claim.id, v.claim.target.path)
		}
		n.stop(v)
		v.log.Info("volume unpublished")
	}
	if err := n.store.remove(req.GetVolumeId()); err != nil {
		return nil, status.Error(codes.Internal, fmt.Sprintf("forgetting the volume: %v", err))
	}
	if err := n.pods.remove(t); err != nil {
		n.conf.Log.Error("the folder of a volume cannot be removed", "pod_uid", t.pod, "volume", t.volume, "reason", err.Error())
		return nil, status.Error(codes.Internal, fmt.Sprintf("removing the volume's folder: %v", err))
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}
