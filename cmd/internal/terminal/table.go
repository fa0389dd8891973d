package terminal

import (
	"bufio"
	"bytes"
	"slices"
	"strconv"
	"strings"
)

// Cell is one text of a row.
type Cell struct {
	Text  string
	Style Style
}

// Row is a line of a table: cells, or a text by itself, that begins behind a Lead. Hang is how far in the lines begin
// that it is broken into, and with a Lead the first one too.
type Row struct {
	Cells      []Cell
	Lead, Line string
	Style      Style // of Line
	Hang       int
}

// Table is rows of cells in columns. An empty cell is "-", a row of nothing an empty line.
type Table struct {
	Indent int
	Rows   []Row
	// Wrap has the last column broken into lines, where others are cut off.
	Wrap bool
	// Shrink are the columns that are cut where a line is too long, in the order in which that is done, with what they
	// keep at least. What is still too long is cut off.
	Shrink []Shrink
}

// Shrink is a column that may be cut.
type Shrink struct{ Column, Least int }

// Cells makes a row of texts.
func Cells(texts ...string) Row {
	r := Row{Cells: make([]Cell, len(texts))}
	for i, t := range texts {
		r.Cells[i].Text = t
	}
	return r
}

// gap is what is between two columns.
const gap = 2

// Print writes a table.
func (s Screen) Print(t *Table) error {
	w := bufio.NewWriterSize(s, 64<<10)
	widths := t.widths(s)
	var line []byte
	for _, r := range t.Rows {
		if line = line[:0]; r.Cells == nil {
			line = s.text(line, r)
		} else {
			line = s.cells(line, r, widths, t)
		}
		if _, err := w.Write(line); err != nil {
			return err
		}
	}
	return w.Flush()
}

// text appends a row without cells.
func (s Screen) text(out []byte, r Row) []byte {
	lead := r.Lead
	for i, part := range s.lines(r) {
		if i > 0 || lead != "" {
			out = pad(append(out, s.Paint(Plain, lead)...), r.Hang-Width(lead))
			lead = ""
		}
		out = append(append(out, s.Paint(r.Style, part)...), '\n')
	}
	return out
}

// cells appends a row of cells. What has no room is left out.
func (s Screen) cells(out []byte, r Row, widths []int, t *Table) []byte {
	out = pad(out, t.Indent)
	left := s.Width - t.Indent
	for i, c := range r.Cells {
		if c.Text == "" {
			c.Text, c.Style = "-", Dim
		}
		if s.Width > 0 {
			if left < 1 {
				break
			}
			const narrow = 16
			if t.Wrap && i == len(r.Cells)-1 && left >= narrow {
				lines := Wrap(c.Text, left)
				for _, l := range lines[:len(lines)-1] {
					out = pad(append(append(out, s.Paint(c.Style, l)...), '\n'), s.Width-left)
				}
				c.Text = lines[len(lines)-1]
			}
			c.Text = Cut(c.Text, min(widths[i], left))
		}
		out = append(out, s.Paint(c.Style, c.Text)...)
		if i < len(r.Cells)-1 {
			out = pad(out, widths[i]-Width(c.Text)+gap)
		}
		left -= widths[i] + gap
	}
	return append(bytes.TrimRight(out, " "), '\n')
}

// lines are what a row without cells is broken into.
func (s Screen) lines(r Row) []string {
	if s.Width <= 0 {
		return []string{r.Line}
	}
	if r.Lead != "" {
		return Wrap(r.Line, max(s.Width-r.Hang, 1))
	}
	first := r.Line[:len(r.Line)-len(strings.TrimLeft(r.Line, " "))]
	lines := Wrap(r.Line, s.Width)
	if len(lines) > 1 {
		lines = Wrap(strings.TrimSpace(r.Line), s.Width-max(r.Hang, len(first)))
		lines[0] = first + lines[0]
	}
	return lines
}

func pad(line []byte, n int) []byte {
	for range n {
		line = append(line, ' ')
	}
	return line
}

// widths are those of the columns.
func (t *Table) widths(s Screen) []int {
	var widths []int
	for _, r := range t.Rows {
		for i, c := range r.Cells {
			if i == len(widths) {
				widths = append(widths, 1)
			}
			widths[i] = max(widths[i], Width(c.Text))
		}
	}
	if s.Width <= 0 || len(widths) == 0 {
		return widths
	}

	total := t.Indent + gap*(len(widths)-1)
	for _, n := range widths {
		total += n
	}
	for _, c := range t.Shrink {
		if over := total - s.Width; over > 0 && c.Column < len(widths) {
			less := min(over, max(widths[c.Column]-c.Least, 0))
			widths[c.Column] -= less
			total -= less
		}
	}
	return widths
}

// PrintRows writes a table whose first row is its header. The last column is broken into lines.
func (s Screen) PrintRows(rows [][]string, shrink ...Shrink) error {
	t := Table{Shrink: shrink, Wrap: true}
	for i, r := range rows {
		row := Cells(r...)
		for j := range row.Cells {
			if i == 0 {
				row.Cells[j].Style = Bold
			}
		}
		t.Rows = append(t.Rows, row)
	}
	return s.Print(&t)
}

// Fold writes numbers as ranges with a word before each: vf0-3,vf6.
func Fold(word string, numbers []int) string {
	numbers = slices.Sorted(slices.Values(numbers))
	var out []string
	for i := 0; i < len(numbers); {
		j := i
		for j+1 < len(numbers) && numbers[j+1] == numbers[j]+1 {
			j++
		}
		text := word + strconv.Itoa(numbers[i])
		if j > i {
			text += "-" + strconv.Itoa(numbers[j])
		}
		out = append(out, text)
		i = j + 1
	}
	return strings.Join(out, ",")
}
