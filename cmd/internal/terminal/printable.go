package terminal

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Printable writes text without what a terminal would take for orders, or show out of its place: control and format
// characters other than ends of lines and tabs, and bytes that are no UTF-8, become \u001b and the like. What a device,
// a snapshot, a file or a process calls itself may hold any of them. In JSON, where these stand in strings alone, they
// are the same characters.
type Printable struct {
	w io.Writer

	mu   sync.Mutex
	rest []byte // of a character whose end has not come yet
}

// NewPrintable makes one.
func NewPrintable(w io.Writer) *Printable { return &Printable{w: w} }

func (p *Printable) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	text := b
	if len(p.rest) > 0 {
		text = append(p.rest, b...)
	}
	// A character may be cut off by the end of a buffer.
	whole := len(text)
	for back := 1; back < utf8.UTFMax && back <= len(text); back++ {
		if last := text[len(text)-back:]; utf8.RuneStart(last[0]) {
			if !utf8.FullRune(last) {
				whole = len(text) - back
			}
			break
		}
	}
	p.rest = append([]byte(nil), text[whole:]...)
	if text = text[:whole]; len(text) > 0 {
		if _, err := p.w.Write(Clean(text)); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

// Flush writes what is left of a character that was never ended.
func (p *Printable) Flush() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	rest := p.rest
	p.rest = nil
	if len(rest) == 0 {
		return nil
	}
	_, err := p.w.Write(Clean(rest))
	return err
}

// Clean is text with such characters spelt out.
func Clean(text []byte) []byte {
	if plain(text) || utf8.Valid(text) && bytes.IndexFunc(text, order) < 0 {
		return text
	}
	var out bytes.Buffer
	for len(text) > 0 {
		r, n := utf8.DecodeRune(text)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&out, `\u%04x`, text[0])
		case order(r) && r > 0xffff:
			one, two := utf16.EncodeRune(r)
			fmt.Fprintf(&out, `\u%04x\u%04x`, one, two)
		case order(r):
			fmt.Fprintf(&out, `\u%04x`, r)
		default:
			out.Write(text[:n])
		}
		text = text[n:]
	}
	return out.Bytes()
}

// plain reports whether text is of ASCII that is only shown, as most is.
func plain[T string | []byte](text T) bool {
	for i := range len(text) {
		if b := text[i]; b >= 0x7f || b < ' ' && b != '\n' && b != '\t' {
			return false
		}
	}
	return true
}

// order reports whether a character is none that is only shown.
func order(r rune) bool {
	if r < 0x7f {
		return r < ' ' && r != '\n' && r != '\t'
	}
	return unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp)
}
