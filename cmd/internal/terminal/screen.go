// Package terminal lays out text for people: cut to a terminal's width and in colour there, plain and whole in a pipe
// or a file.
package terminal

import (
	"cmp"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Screen is what text for people is laid out for.
type Screen struct {
	io.Writer      // takes what Paint makes as it is
	Width     int  // in columns; 0 means without limit
	Colour    bool // whether text may have styles
}

// Colours are what --color may be; the first one is the default.
var Colours = []string{"auto", "always", "never"}

// sized is a terminal that knows its width, as a test's does.
type sized interface{ Columns() int }

// Of is the screen that w is. Only a terminal has a width: COLUMNS, where that is set, or what the terminal says of
// itself. It has colours unless NO_COLOR is set (https://no-color.org) or colour, one of Colours, says otherwise.
func Of(w io.Writer, colour string, getenv func(string) string) Screen {
	s := Screen{Writer: w}
	switch t := w.(type) {
	case sized:
		s.Width = t.Columns()
	case *os.File:
		if size, err := unix.IoctlGetWinsize(int(t.Fd()), unix.TIOCGWINSZ); err == nil {
			columns, _ := strconv.ParseUint(getenv("COLUMNS"), 10, 16)
			s.Width = cmp.Or(int(columns), int(size.Col), 80)
		}
	}
	s.Colour = colour == "always" ||
		colour != "never" && s.Width > 0 && getenv("NO_COLOR") == "" && getenv("TERM") != "dumb"
	return s
}

// Style is what a text means, which its colour shows.
type Style string

// The styles, as parameters of SGR (ECMA-48 8.3.117).
const (
	Plain Style = ""
	Bold  Style = "1"
	Dim   Style = "2"
	Good  Style = "32" // free, or a guest's
	Note  Style = "36" // a name
	Warn  Style = "33" // in use by the host
	Bad   Style = "31" // wrong, or refused
)

// Paint is a text in a style, without what a terminal would take for orders.
func (s Screen) Paint(style Style, text string) string {
	if !plain(text) {
		text = string(Clean([]byte(text)))
	}
	if !s.Colour || style == Plain || text == "" {
		return text
	}
	return "\x1b[" + string(style) + "m" + text + "\x1b[0m"
}
