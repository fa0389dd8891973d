package terminal

import (
	"bytes"
	"io"
	"sync"
	"time"
)

// Progress is one line at the bottom of a terminal that is rewritten, for what takes longer than a moment. What is
// written through it stands above the line. On what is no terminal there is no line.
type Progress struct {
	to    io.Writer // the terminal, nil if there is none
	width int

	mu    sync.Mutex
	text  string
	drawn bool
	due   bool // it took long enough to be shown
	timer *time.Timer
}

// Patience is how long something takes before its progress is shown.
const Patience = time.Second

// NewProgress makes a line on a screen.
func NewProgress(s Screen) *Progress {
	p := &Progress{width: s.Width}
	if s.Width > 0 {
		p.to = s.Writer
	}
	return p
}

// Set says how far it is.
func (p *Progress) Set(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.to == nil {
		return
	}
	if p.text = text; text == "" {
		p.clear()
	}
	if p.timer == nil {
		p.timer = time.AfterFunc(Patience, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.due = p.timer != nil
			p.draw()
		})
	}
	p.draw()
}

// Done takes the line away.
func (p *Progress) Done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
	}
	p.timer, p.due, p.text = nil, false, ""
	p.clear()
}

// Over is a writer whose text stands above the line.
func (p *Progress) Over(w io.Writer) io.Writer { return over{p, w} }

type over struct {
	p *Progress
	w io.Writer
}

func (o over) Write(b []byte) (int, error) {
	o.p.mu.Lock()
	defer o.p.mu.Unlock()
	o.p.clear()
	n, err := o.w.Write(b)
	if bytes.HasSuffix(b, []byte{'\n'}) {
		o.p.draw()
	}
	return n, err
}

// draw and clear are called with the lock. "\x1b[K" erases to the end of the line (ECMA-48 8.3.41).
func (p *Progress) draw() {
	if !p.due || p.to == nil || p.text == "" {
		return
	}
	text := Cut(string(Clean([]byte(p.text))), p.width-1)
	_, err := io.WriteString(p.to, "\r"+text+"\x1b[K")
	p.drawn = err == nil
}

func (p *Progress) clear() {
	if p.drawn {
		_, _ = io.WriteString(p.to, "\r\x1b[K")
		p.drawn = false
	}
}
