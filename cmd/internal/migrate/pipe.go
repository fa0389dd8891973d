package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"viaduct/vfio/holder"
)

// Stream is both directions to the other side.
type Stream interface {
	io.Reader
	io.Writer
	io.Closer
}

// Remote is the way to the destination: each call is a new run of the transport.
type Remote interface {
	// Connect begins a conversation.
	Connect(ctx context.Context) (*Pipe, error)
	// Data opens a stream to the QEMU there that waits for the memory of a move.
	Data(ctx context.Context, id string) (Stream, error)
}

// Pipe is the source's end of a conversation.
type Pipe struct {
	stream Stream
	line   *line
	last   int
}

// Converse begins a conversation over a stream, which is the pipe's from then on.
func Converse(ctx context.Context, s Stream, version string) (*Pipe, error) {
	p := &Pipe{stream: s, line: newLine(s, s)}
	const mostGreeting = 30 * time.Second
	ctx, cancel := context.WithTimeoutCause(ctx, mostGreeting, fmt.Errorf("no answer within %s", mostGreeting))
	defer cancel()
	if err := p.during(ctx, func() error { return p.line.greet(version) }); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// during does something that ends when the stream is closed, at the latest with the context.
func (p *Pipe) during(ctx context.Context, do func() error) error {
	stop := context.AfterFunc(ctx, p.Close)
	err := do()
	if !stop() {
		return errors.Join(context.Cause(ctx), err)
	}
	return err
}

// Close ends the conversation.
func (p *Pipe) Close() { _ = p.stream.Close() }

// mostAnswer is how long the destination may take for a step; to reserve a device, or to release it, is the longest.
const mostAnswer = 3 * time.Minute

// Ask asks a question and waits for its answer, whose body is read into out. An answer that says that it was not done
// is
// an error, with the answer; without one the conversation has ended.
func (p *Pipe) Ask(ctx context.Context, q *Question, body, out any) (*Answer, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, mostAnswer, fmt.Errorf("no answer within %s", mostAnswer))
	defer cancel()
	p.last++
	q.Number = p.last
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		q.Body = b
	}

	var a Answer
	err := p.during(ctx, func() error {
		if err := p.line.write(q); err != nil {
			return err
		}
		return p.line.read(&a)
	})

	switch {
	case err != nil:
		return nil, fmt.Errorf("the other side does not answer: %w", err)
	case a.Number != q.Number:
		return nil, fmt.Errorf("the other side answers question %d instead of %d", a.Number, q.Number)
	case a.Refused:
		return &a, holder.Because("do it on the other side", holder.Reason{Kind: holder.Unsuitable, Text: a.Error}, "")
	case a.Error != "":
		return &a, fmt.Errorf("on the other side: %s", a.Error)
	}

	if out != nil && a.Body != nil {
		if err := json.Unmarshal(a.Body, out); err != nil {
			return &a, fmt.Errorf("the other side's answer: %w", err)
		}
	}

	return &a, nil
}

// relay is a socket that the source's QEMU sends to, and what carries that to the destination.
type relay struct {
	socket   string
	listener net.Listener
	cancel   context.CancelFunc
	done     sync.WaitGroup
}

// newRelay listens at a socket of its own, for one connection.
func newRelay(remote Remote, r *Record) (*relay, error) {
	socket := dataSocket(r)
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	out := &relay{socket: socket, listener: l, cancel: cancel}
	out.done.Go(func() {
		conn, err := l.Accept()
		_ = l.Close()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		stream, err := remote.Data(ctx, r.ID)
		if err != nil {
			return
		}
		defer stream.Close()
		defer context.AfterFunc(ctx, func() { _, _ = conn.Close(), stream.Close() })()
		Carry(conn, stream)
	})
	return out, nil
}

func (r *relay) close() {
	r.cancel()
	_ = r.listener.Close()
	r.done.Wait()
	_ = os.Remove(r.socket)
}

// Carry carries what comes from each of two streams to the other, until one of them ends.
func Carry(a, b Stream) {
	ended := make(chan struct{}, 2)
	half := func(to, from Stream) {
		_, _ = io.Copy(to, from)
		ended <- struct{}{}
	}
	go half(a, b)
	go half(b, a)
	<-ended
	_, _ = a.Close(), b.Close()
	<-ended
}
