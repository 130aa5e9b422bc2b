package server

import (
	"context"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/meshca/meshca/ca/caller"
)

const bearerPrefix = "Bearer "

// authenticate says who makes a call. Every handler begins with it.
func (s *Server) authenticate(ctx context.Context) (*caller.Caller, error) {
	leave, err := s.arriving.enter(sourceOfCall(ctx))
	if err != nil {
		return nil, &callError{code: codes.ResourceExhausted, err: err}
	}
	defer leave()
	if _, ok := ctx.Deadline(); !ok { // a stream has none
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.callTimeout)
		defer cancel()
	}
	creds, err := credentialsOf(ctx)
	if err != nil {
		return nil, err
	}
	who, err := s.authenticator.Authenticate(ctx, creds)
	if err != nil {
		return nil, err
	}
	callOf(ctx).who = who
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(connInfo); ok {
			info.conn.known()
		}
	}
	return who, nil
}

// credentialsOf reads what a call shows. Nothing of the authorization value
// goes into an error, not even of a malformed one: it may be a token with a
// typing mistake in front of it.
func credentialsOf(ctx context.Context) (caller.Credentials, error) {
	var c caller.Credentials
	if p, ok := peer.FromContext(ctx); ok {
		c.Peer = p.Addr.String()
		if info, ok := p.AuthInfo.(connInfo); ok {
			c.Certificates = info.State.PeerCertificates
		}
	}
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(values) == 0 {
		return c, nil
	}
	if len(values) > 1 {
		// Which one would count could differ between us and a proxy in between.
		return c, refusef(codes.Unauthenticated, "there are %d authorization values; send exactly one", len(values))
	}
	token, ok := strings.CutPrefix(values[0], bearerPrefix)
	if !ok || token == "" {
		return c, refusef(codes.Unauthenticated, "the authorization value is not %q and a token", bearerPrefix)
	}
	c.Bearer = token
	return c, nil
}
