package terminal

import (
	"io"
	"strings"
	"testing"
	"time"
)

// A line of progress is shown once it took long enough, makes way for what is written, and is gone in the end.
func TestProgress(t *testing.T) {
	screen := &fake{columns: 20}
	p := NewProgress(Of(screen, "never", func(string) string { return "" }))
	out := p.Over(screen)
	p.Set("ens1f0 0/16 VFs")
	if screen.Len() != 0 {
		t.Errorf("shown at once: %q", screen.String())
	}
	p.mu.Lock()
	p.due = true // as after Patience
	p.mu.Unlock()
	p.Set("ens1f0 16/16 VFs, 9/16 set\x1b[31m")
	if _, err := io.WriteString(out, "a note\n"); err != nil {
		t.Fatal(err)
	}
	p.Done()
	const line = "\rens1f0 16/16 VFs,…\x1b[K"
	if want := line + "\r\x1b[Ka note\n" + line + "\r\x1b[K"; screen.String() != want {
		t.Errorf("%q\nwant %q", screen.String(), want)
	}
	if n := Width("ens1f0 16/16 VFs,…"); n >= 20 {
		t.Errorf("the line has %d columns", n)
	}
}

// By itself it comes after a time, and what is no terminal never has one.
func TestProgressPatience(t *testing.T) {
	shown := make(chan string, 1)
	p := NewProgress(Screen{Writer: writer(func(b []byte) { shown <- string(b) }), Width: 80})
	p.Set("working")
	select {
	case text := <-shown:
		if !strings.Contains(text, "working") {
			t.Errorf("%q", text)
		}
	case <-time.After(30 * time.Second):
		t.Error("it was never shown")
	}
	pipe := NewProgress(Screen{Writer: writer(func(b []byte) { t.Errorf("%q", b) })})
	pipe.Set("working")
	pipe.Done()
}

type writer func([]byte)

func (w writer) Write(b []byte) (int, error) {
	w(b)
	return len(b), nil
}
