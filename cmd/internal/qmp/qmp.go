// Package qmp speaks QEMU's machine protocol (docs/interop/qmp-spec.rst of QEMU): commands, their answers, and events,
// over a unix socket. An answer may have any length up to a bound that no QEMU comes near.
package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// mostMessage is more than any message has: query-qmp-schema of QEMU 11 answers 250 KB.
	mostMessage = 64 << 20
	// mostEvents is how many events are kept for who waits for them.
	mostEvents = 1 << 14
)

// ErrClosed says that the connection ended: QEMU has ended, or closed it.
var ErrClosed = errors.New("the connection to QEMU has ended")

// Error is QEMU's answer to a command that failed.
type Error struct {
	Command string `json:"-"`
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *Error) Error() string { return fmt.Sprintf("QEMU refused %s: %s", e.Command, e.Desc) }

// Event is something that QEMU told by itself.
type Event struct {
	Name string
	Data json.RawMessage // nil if it has none
	Time time.Time       // by QEMU's clock of the day; zero if it did not tell
}

// Client is a connection to one QEMU. Its methods may be called at once.
type Client struct {
	// PID is the process that listens at the socket: QEMU; 0 if it is not known.
	PID int

	conn net.Conn

	writing sync.Mutex

	mu      sync.Mutex
	last    uint64
	waiting map[string]chan reply
	events  []Event
	first   int           // the number of events[0]
	news    chan struct{} // closed, and made anew, with each event and at the end
	ended   error         // why nothing more comes
}

type reply struct {
	value json.RawMessage
	err   *Error
}

// message is whatever QEMU sends.
type message struct {
	Greeting  json.RawMessage `json:"QMP"`
	ID        json.RawMessage `json:"id"`
	Return    json.RawMessage `json:"return"`
	Error     *Error          `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// Dial connects to the socket of a QEMU, which serves one client at a time: while it has another, Dial waits until the
// context ends. The caller closes the client.
func Dial(ctx context.Context, socket string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to QEMU: %w", err)
	}
	c, err := New(ctx, conn)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", socket, err)
	}
	c.PID = listener(conn)
	return c, nil
}

// listener is the process that listens at the other end of a unix socket (unix(7), SO_PEERCRED); 0 if nobody tells.
func listener(conn net.Conn) int {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// New begins to speak with the QEMU at the other end of a connection, which is the client's from then on.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{conn: conn, waiting: map[string]chan reply{}, news: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	in := &bounded{r: conn}
	decoder := json.NewDecoder(in)

	var hello message
	err := in.next(decoder, &hello)
	switch {
	case !stop():
		err = fmt.Errorf("QEMU does not greet, as it does while it has another client: %w", context.Cause(ctx))
	case err != nil:
		err = fmt.Errorf("QEMU did not greet: %w", err)
	case hello.Greeting == nil:
		err = errors.New("what is at the other end does not greet as QEMU does")
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}

	go c.read(in, decoder)
	if err := c.Do(ctx, "qmp_capabilities", nil, nil); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Close ends the connection; QEMU runs on.
func (c *Client) Close() error {
	err := c.conn.Close()
	c.end(ErrClosed)
	return err
}

// read takes what QEMU sends until the connection ends.
func (c *Client) read(in *bounded, decoder *json.Decoder) {
	for {
		var m message
		if err := in.next(decoder, &m); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				err = ErrClosed
			} else {
				err = errors.Join(ErrClosed, err)
			}
			c.end(err)
			_ = c.conn.Close()
			return
		}
		c.take(&m)
	}
}

// take hands a message to who waits for it.
func (c *Client) take(m *message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.Event != "" {
		e := Event{Name: m.Event, Data: m.Data}
		if m.Timestamp.Seconds > 0 {
			e.Time = time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)
		}
		if c.events = append(c.events, e); len(c.events) > mostEvents {
			c.events = append([]Event(nil), c.events[mostEvents/2:]...)
			c.first += mostEvents / 2
		}
		c.wake()
		return
	}

	// An answer that nobody waits for any more is let go.
	if answer := c.waiting[string(m.ID)]; answer != nil {
		delete(c.waiting, string(m.ID))
		answer <- reply{m.Return, m.Error}
	}
}

// wake wakes all that wait; c.mu is held.
func (c *Client) wake() {
	close(c.news)
	c.news = make(chan struct{})
}

func (c *Client) end(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended == nil {
		c.ended = why
		c.wake()
	}
}

// Do carries out a command and reads its answer into out, which may be nil. It fails with an *Error if QEMU refuses,
// and with one that matches ErrClosed if the connection ends; when the context ends first, QEMU may still carry it out.
func (c *Client) Do(ctx context.Context, command string, args, out any) error {
	c.mu.Lock()
	c.last++
	id := strconv.FormatUint(c.last, 10)
	answer := make(chan reply, 1)
	c.waiting[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
	}()

	if err := c.send(ctx, command, id, args); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	var r reply
	for done := false; !done; {
		c.mu.Lock()
		news, ended := c.news, c.ended
		c.mu.Unlock()
		select {
		case r = <-answer:
			done = true
		default:
			if ended != nil {
				return fmt.Errorf("%s: %w", command, ended)
			}
			select {
			case r = <-answer:
				done = true
			case <-news:
			case <-ctx.Done():
				return fmt.Errorf("%s: QEMU has not answered: %w", command, context.Cause(ctx))
			}
		}
	}

	if r.err != nil {
		r.err.Command = command
		return r.err
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(r.value, out); err != nil {
		return fmt.Errorf("%s: QEMU's answer: %w", command, err)
	}
	return nil
}

// send writes a command, and gives up when the context ends. What was written in part leaves the connection useless.
func (c *Client) send(ctx context.Context, command, id string, args any) error {
	b, err := json.Marshal(struct {
		Execute   string          `json:"execute"`
		ID        json.RawMessage `json:"id"`
		Arguments any             `json:"arguments,omitempty"`
	}{command, json.RawMessage(id), args})
	if err != nil {
		return err
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.conn.SetWriteDeadline(time.Time{}); err != nil {
		return errors.Join(ErrClosed, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetWriteDeadline(time.Unix(1, 0)) })
	_, err = c.conn.Write(append(b, '\n'))
	stop()
	if err != nil {
		_ = c.conn.Close()
		return errors.Join(ErrClosed, err)
	}
	return nil
}

// Mark is where events are now: Await from here sees those that come later. It is taken before the command whose
// events are awaited.
func (c *Client) Mark() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first + len(c.events)
}

// Since are the events since a mark.
func (c *Client) Since(mark int) []Event {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Event(nil), c.events[min(max(mark-c.first, 0), len(c.events)):]...)
}

// Await waits for the first event since a mark that matches. It ends with the context, and with an error that matches
// ErrClosed when the connection has ended and no such event had come.
func (c *Client) Await(ctx context.Context, mark int, match func(Event) bool) (Event, error) {
	for {
		c.mu.Lock()
		seen := c.events[min(max(mark-c.first, 0), len(c.events)):]
		mark = c.first + len(c.events)
		news, ended := c.news, c.ended
		c.mu.Unlock()
		// The array behind seen is only ever appended to.
		for _, e := range seen {
			if match(e) {
				return e, nil
			}
		}
		if ended != nil {
			return Event{}, ended
		}
		select {
		case <-news:
		case <-ctx.Done():
			return Event{}, context.Cause(ctx)
		}
	}
}

// Ended is why the connection has ended; nil while it lasts.
func (c *Client) Ended() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// bounded reads no more for one message than any message has.
type bounded struct {
	r    io.Reader
	left int
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errors.New("QEMU sent a message longer than any")
	}
	n, err := b.r.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

func (b *bounded) next(d *json.Decoder, m *message) error {
	b.left = mostMessage
	return d.Decode(m)
}
