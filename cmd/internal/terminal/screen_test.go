package terminal

import (
	"bytes"
	"strings"
	"testing"
)

type fake struct {
	bytes.Buffer
	columns int
}

func (f *fake) Columns() int { return f.columns }

func TestOf(t *testing.T) {
	for name, c := range map[string]struct {
		columns       int
		colour        string
		env           map[string]string
		width         int
		paints, pipes bool
	}{
		"terminal":        {80, "auto", nil, 80, true, false},
		"NO_COLOR":        {80, "auto", map[string]string{"NO_COLOR": "1"}, 80, false, false},
		"dumb":            {80, "auto", map[string]string{"TERM": "dumb"}, 80, false, false},
		"always, no tint": {80, "always", map[string]string{"NO_COLOR": "1"}, 80, true, true},
		"never":           {120, "never", nil, 120, false, false},
	} {
		getenv := func(key string) string { return c.env[key] }
		if s := Of(&fake{columns: c.columns}, c.colour, getenv); s.Width != c.width || s.Colour != c.paints {
			t.Errorf("%s: width %d, colour %v", name, s.Width, s.Colour)
		}
		if s := Of(&bytes.Buffer{}, c.colour, getenv); s.Width != 0 || s.Colour != c.pipes {
			t.Errorf("%s in a pipe: width %d, colour %v", name, s.Width, s.Colour)
		}
	}
}

func TestCutWrapFold(t *testing.T) {
	for _, c := range []struct {
		text string
		most int
		want string
	}{
		{"Ethernet Controller", 0, "Ethernet Controller"}, {"Ethernet", 8, "Ethernet"}, {"Ethernet", 7, "Ethern…"},
		{"Ethernet Controller", 10, "Ethernet…"}, {"網路卡", 6, "網路卡"}, {"網路卡", 5, "網路…"}, {"網路卡", 4, "網…"},
		{"a\u0301bc", 3, "a\u0301bc"},
	} {
		if got := Cut(c.text, c.most); got != c.want || c.most > 0 && Width(got) > c.most {
			t.Errorf("Cut(%q, %d) = %q, want %q", c.text, c.most, got, c.want)
		}
	}
	if got := strings.Join(Wrap("one two  three", 7), "|"); got != "one two|three" {
		t.Errorf("wrapped as %q", got)
	}
	if got := Fold("vf", []int{6, 0, 1, 2, 9, 8}); got != "vf0-2,vf6,vf8-9" {
		t.Errorf("folded as %q", got)
	}
}

// Lines fit a screen, a column that may shrink does before others are cut off, and what is no screen gets all of it.
func TestTable(t *testing.T) {
	table := &Table{Indent: 2, Shrink: []Shrink{{1, 4}}, Rows: []Row{
		Cells("0000:01:00.0", "Gigabit Ethernet", "enp1s0"),
		Cells("0000:02:00.0", "", "a-name-that-is-long"),
		{Line: "  a text that is broken", Hang: 4},
	}}
	for width, want := range map[int]string{
		0: "  0000:01:00.0  Gigabit Ethernet  enp1s0\n  0000:02:00.0  -                 a-name-that-is-long\n" +
			"  a text that is broken\n",
		30: "  0000:01:00.0  Gig…  enp1s0\n  0000:02:00.0  -     a-name-…\n  a text that is broken\n",
		20: "  0000:01:00.0  Gig…\n  0000:02:00.0  -\n  a text that is\n    broken\n",
	} {
		var out bytes.Buffer
		if err := (Screen{Writer: &out, Width: width}).Print(table); err != nil {
			t.Fatal(err)
		}
		got := out.String()
		for line := range strings.Lines(got) {
			if n := Width(strings.TrimSuffix(line, "\n")); width > 0 && n > width {
				t.Errorf("%d columns of %d: %q", n, width, line)
			}
		}
		if got != want {
			t.Errorf("at %d:\n%swant\n%s", width, got, want)
		}
	}
}

// The last column of rows is broken at words and not cut.
func TestPrintRows(t *testing.T) {
	var out bytes.Buffer
	rows := [][]string{{"FORMAT", "WHAT"}, {"qemu", "one two three four five"}, {"json", ""}}
	if err := (Screen{Writer: &out, Width: 26}).PrintRows(rows); err != nil {
		t.Fatal(err)
	}
	want := "FORMAT  WHAT\nqemu    one two three four\n        five\njson    -\n"
	if out.String() != want {
		t.Errorf("%q\nwant %q", out.String(), want)
	}
}

// What a device calls itself gives no orders in a painted text either.
func TestPaint(t *testing.T) {
	if got := (Screen{Colour: true}).Paint(Good, "a\x1b[31m"); got != "\x1b[32ma\\u001b[31m\x1b[0m" {
		t.Errorf("%q", got)
	}
	if got := (Screen{}).Paint(Good, "a\x1b[31m"); got != `a\u001b[31m` {
		t.Errorf("%q", got)
	}
}
