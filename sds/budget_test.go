package sds

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Whoever takes all that there is to share leaves the others what is their own,
// and gives back what it has taken.
func TestT17_BudgetIsFair(t *testing.T) {
	b := NewBudget(10, 0)
	takeAll := func(p *places) (n int) {
		for p.take() {
			n++
		}
		return n
	}
	greedy, second, third := b.forConnections(12), b.forConnections(12), b.forConnections(12)
	if n := takeAll(greedy); n != 12 {
		t.Errorf("%d places of a socket that has at most 12", n)
	}
	if n := takeAll(second); n != ownConnections+2 {
		t.Errorf("%d places where 2 are left to share", n)
	}
	if n := takeAll(third); n != ownConnections {
		t.Errorf("%d places where nothing is left to share", n)
	}
	for range 12 {
		greedy.leave()
	}
	if n := takeAll(third); n != 8 {
		t.Errorf("%d places more when 8 were given back", n)
	}
	if n := takeAll(b.forCalls(100)); n != ownCalls {
		t.Errorf("%d calls where nothing is to share", n)
	}
}

func TestT17_NamesOfASocketAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := start(t)
		k.ready()
		var names []string
		for i := range maxNames - 1 {
			names = append(names, fmt.Sprint(i))
		}
		ctx, cancel := context.WithCancel(inTime(t))
		sendSotW(t, k.sotw(ctx), sotwRequest("", names...))
		synctest.Wait()
		x := k.sotw(inTime(t))
		sendSotW(t, x, sotwRequest("", "default"))
		recv(t, x)
		y := k.sotw(inTime(t))
		sendSotW(t, y, sotwRequest("", "ROOTCA"))
		if err := recvError(y); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("one name more than the limit, on a third stream: %v", err)
		}
		cancel()
		synctest.Wait()
		y = k.sotw(inTime(t))
		sendSotW(t, y, sotwRequest("", "ROOTCA"))
		recv(t, y) // a stream that ended gives its names back
	})
}
