package migrate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// probeEvery is how often a guest is asked that answers. One that does not is asked more and more seldom, as one that
// is overwhelmed would have no time for anything else.
const probeEvery = 10 * time.Millisecond

// probeAfter is when to ask next, after so many questions without an answer.
func probeAfter(unanswered int) time.Duration {
	const patience, most = 10, 20
	return probeEvery * time.Duration(min(1+unanswered/patience, most))
}

// Probe asks a guest over and over, during its move, whether it hears: by ARP (RFC 826), which every guest answers that
// has an IPv4 address, and for which this host needs none.
type Probe struct {
	conn   packets
	ask    []byte
	of     netip.Addr
	stop   chan struct{}
	done   sync.WaitGroup
	mu     sync.Mutex
	probed Probed
	heard  time.Time
	asked  int // since then
}

// Probed is what a probe has heard. An answer does not say which question it is to, so an answer that took longer than
// the next question counts as well as any.
type Probed struct {
	Address  string        `json:"address"`
	Sent     int           `json:"sent"`
	Answered int           `json:"answered"`
	Silence  time.Duration `json:"-"` // the longest without an answer, or until the end
}

// packets is a way to a network: whole frames.
type packets interface {
	send([]byte) error
	// receive waits for a frame, for a short time.
	receive([]byte) (int, error)
	Close() error
}

// NewProbe begins to ask who has an address, over a network interface: the guest alone, by its MAC address, or, if that
// is not known, all.
func NewProbe(netdev string, mac net.HardwareAddr, address netip.Addr) (*Probe, error) {
	i, err := net.InterfaceByName(netdev)
	if err != nil {
		return nil, fmt.Errorf("probe %s: %w", address, err)
	}
	conn, err := openPackets(i.Index)
	if err != nil {
		return nil, fmt.Errorf("probe %s over %s: %w", address, netdev, err)
	}
	return probe(conn, i.HardwareAddr, mac, address), nil
}

func probe(conn packets, own, to net.HardwareAddr, address netip.Addr) *Probe {
	p := &Probe{conn: conn, ask: whoHas(own, to, address), of: address, stop: make(chan struct{}), heard: time.Now()}
	p.probed.Address = address.String()
	p.done.Go(p.sends)
	p.done.Go(p.hears)
	return p
}

// End ends it, and tells what it has heard.
func (p *Probe) End() Probed {
	close(p.stop)
	p.done.Wait()
	_ = p.conn.Close()
	p.silent(time.Now())
	return p.probed
}

// silent notes how long it was silent until now.
func (p *Probe) silent(now time.Time) { p.probed.Silence = max(p.probed.Silence, now.Sub(p.heard)) }

func (p *Probe) sends() {
	for {
		// What could not be sent is a frame that was lost, too.
		_ = p.conn.send(p.ask)
		p.mu.Lock()
		p.probed.Sent++
		p.asked++
		next := probeAfter(p.asked - 1)
		p.mu.Unlock()
		select {
		case <-p.stop:
			return
		case <-time.After(next):
		}
	}
}

func (p *Probe) hears() {
	frame := make([]byte, 1<<11)
	for {
		select {
		case <-p.stop:
			return
		default:
		}
		n, err := p.conn.receive(frame)
		if err != nil || !answers(frame[:n], p.of) {
			continue
		}
		now := time.Now()
		p.mu.Lock()
		p.probed.Answered++
		p.silent(now)
		p.heard, p.asked = now, 0
		p.mu.Unlock()
	}
}

// The parts of a frame of ARP for IPv4 over Ethernet.
const (
	arpLength             = 42
	arpRequest, arpAnswer = 1, 2
	typeARP, typeIPv4     = 0x0806, 0x0800
)

// whoHas is the frame that asks who has an address: one of a MAC address, or all. It tells none of the asker's (RFC
// 5227), so nobody learns a wrong one.
func whoHas(own, to net.HardwareAddr, address netip.Addr) []byte {
	if to == nil {
		to = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	}
	b := make([]byte, 0, arpLength)
	b = append(append(b, to...), own...)
	b = binary.BigEndian.AppendUint16(b, typeARP)
	b = binary.BigEndian.AppendUint16(b, 1)
	b = binary.BigEndian.AppendUint16(b, typeIPv4)
	b = append(b, 6, 4)
	b = binary.BigEndian.AppendUint16(b, arpRequest)
	b = append(append(b, own...), 0, 0, 0, 0)
	b = append(b, 0, 0, 0, 0, 0, 0)
	return append(b, address.AsSlice()...)
}

// answers reports whether a frame is the answer of who has an address.
func answers(b []byte, address netip.Addr) bool {
	word := func(at int) uint16 { return binary.BigEndian.Uint16(b[at:]) }
	if len(b) < arpLength || word(12) != typeARP || word(20) != arpAnswer {
		return false
	}
	from, _ := netip.AddrFromSlice(b[28:32])
	return from == address
}

// packetSocket is a socket of packet(7), of ARP alone.
type packetSocket int

func openPackets(netdev int) (packetSocket, error) {
	const protocol = typeARP>>8 | typeARP&0xff<<8 // in the network's order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return 0, err
	}
	wait := unix.NsecToTimeval(int64(100 * time.Millisecond))
	err = errors.Join(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: netdev}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait))
	if err != nil {
		return 0, errors.Join(err, unix.Close(fd))
	}
	return packetSocket(fd), nil
}

func (s packetSocket) send(b []byte) error { return unix.Send(int(s), b, unix.MSG_DONTWAIT) }

func (s packetSocket) receive(b []byte) (int, error) {
	n, _, err := unix.Recvfrom(int(s), b, 0)
	return n, err
}

func (s packetSocket) Close() error { return unix.Close(int(s)) }
