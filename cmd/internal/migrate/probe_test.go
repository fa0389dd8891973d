package migrate

import (
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
)

// network is one with a guest that answers while it is there.
type network struct {
	frames chan []byte
	there  atomic.Bool
	asked  atomic.Int64
}

func (n *network) send(b []byte) error {
	n.asked.Add(1)
	if len(b) != arpLength || b[21] != arpRequest {
		return errors.New("that is no question")
	}
	if n.there.Load() {
		answer := append([]byte(nil), b...)
		answer[21] = arpAnswer
		copy(answer[28:], b[38:42])
		n.frames <- answer
	}
	return nil
}

func (n *network) receive(b []byte) (int, error) {
	select {
	case f := <-n.frames:
		return copy(b, f), nil
	case <-time.After(time.Millisecond):
		return 0, errors.New("nothing came")
	}
}

func (*network) Close() error { return nil }

// What a guest does not answer is lost, and the longest that it is silent is told, also at the end.
func TestProbe(t *testing.T) {
	n := &network{frames: make(chan []byte, 1000)}
	until := func(more int64) {
		for end := n.asked.Load() + more; n.asked.Load() < end; {
			time.Sleep(time.Millisecond)
		}
	}
	n.there.Store(true)
	p := probe(n, net.HardwareAddr{2, 0, 0, 0, 0, 1}, nil, netip.MustParseAddr("10.7.0.5"))
	until(3)
	n.there.Store(false)
	began := time.Now()
	until(10)
	quiet := time.Since(began)
	n.there.Store(true)
	until(3)
	n.frames <- []byte{1, 2, 3}
	got := p.End()
	if lost := got.Sent - got.Answered; got.Address != "10.7.0.5" || got.Answered < 5 || lost < 9 || lost > 12 ||
		got.Silence < quiet {
		t.Errorf("%+v; it was quiet for %s", got, quiet)
	}
}

// A guest that answers is asked every 10 ms, and one that does not, more and more seldom.
func TestProbeAfter(t *testing.T) {
	for unanswered, want := range map[int]time.Duration{0: 10 * time.Millisecond, 9: 10 * time.Millisecond,
		10: 20 * time.Millisecond, 100: 110 * time.Millisecond, 1000: 200 * time.Millisecond} {
		if got := probeAfter(unanswered); got != want {
			t.Errorf("%d: %s, want %s", unanswered, got, want)
		}
	}
}

// A frame of any bytes is an answer only if it is one.
func FuzzAnswers(f *testing.F) {
	address := netip.MustParseAddr("10.7.0.5")
	f.Add(whoHas(net.HardwareAddr{2, 0, 0, 0, 0, 1}, nil, address))
	f.Fuzz(func(t *testing.T, b []byte) {
		if answers(b, address) && len(b) < arpLength {
			t.Errorf("%x is an answer", b)
		}
	})
}
