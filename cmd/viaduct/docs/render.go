package docs

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Width is how many columns text for a terminal takes.
const Width = 80

type kind int

const (
	heading kind = iota
	subheading
	paragraph
	item
	verbatim
)

// block is one piece of a text. That of a paragraph or an item is one line.
type block struct {
	kind kind
	text string
}

// parse cuts a text into its blocks.
func parse(text string) (out []block) {
	last := func() *block {
		if len(out) == 0 {
			return nil
		}
		return &out[len(out)-1]
	}

	open := false // the last block goes on with the next line
	for line := range strings.SplitSeq(text, "\n") {
		code, indented := strings.CutPrefix(line, "    ")
		words := strings.Join(strings.Fields(line), " ")
		switch {
		case words == "":
			if b := last(); b != nil && b.kind == verbatim {
				b.text += "\n"
			}
			open = false
		case strings.HasPrefix(line, "<!--"):
			open = false
		case strings.HasPrefix(line, "# "):
			out, open = append(out, block{heading, line[2:]}), false
		case strings.HasPrefix(line, "## "):
			out, open = append(out, block{subheading, line[3:]}), false
		case indented && !open:
			if b := last(); b != nil && b.kind == verbatim {
				b.text += code + "\n"
			} else {
				out = append(out, block{verbatim, code + "\n"})
			}
		case strings.HasPrefix(line, "- "):
			out, open = append(out, block{item, words[2:]}), true
		case open:
			last().text += " " + words
		default:
			out, open = append(out, block{paragraph, words}), true
		}
	}

	for i := range out {
		if out[i].kind == verbatim {
			out[i].text = strings.TrimRight(out[i].text, "\n") + "\n"
		}
	}

	return out
}

// Text is a text for a terminal.
func Text(text string) string {
	var out strings.Builder
	before := heading
	for i, b := range parse(text) {
		if i > 0 && (b.kind != item || before != item) {
			out.WriteString("\n")
		}
		before = b.kind
		switch b.kind {
		case heading:
			out.WriteString(strings.ToUpper(plain(b.text)) + "\n")
		case subheading:
			out.WriteString(plain(b.text) + "\n")
		case paragraph:
			fill(&out, plain(b.text), "", "")
		case item:
			name, means, defines := term(b.text)
			if defines {
				fill(&out, plain(name), "  ", "      ")
				fill(&out, plain(means), "      ", "      ")
			} else {
				fill(&out, plain(b.text), "  - ", "    ")
			}
		case verbatim:
			for line := range strings.Lines(b.text) {
				out.WriteString(strings.TrimRight("    "+line, " \n") + "\n")
			}
		}
	}

	return out.String()
}

// term cuts an item that defines a word: `WORD`: what it means.
func term(text string) (word, means string, ok bool) {
	word, means, ok = strings.Cut(text, ": ")
	return word, means, ok && strings.HasPrefix(word, "`") && strings.HasSuffix(word, "`")
}

func plain(s string) string { return strings.ReplaceAll(s, "`", "") }

// fill writes words as lines of at most Width columns.
func fill(out *strings.Builder, words, first, rest string) {
	line := first
	for word := range strings.FieldsSeq(words) {
		room := Width - utf8.RuneCountInString(line) - utf8.RuneCountInString(word)
		switch {
		case line == first || line == rest:
			line += word
		case room > 0:
			line += " " + word
		default:
			out.WriteString(line + "\n")
			line = rest + word
		}
	}
	out.WriteString(line + "\n")
}

// Man is a manual page.
func Man(p Page, version string, topics []Topic) string {
	var out strings.Builder
	fmt.Fprintf(&out, ".TH %s %s \"\" \"%s\"\n.SH NAME\n%s \\- %s\n", strings.ToUpper(p.Name), p.Section,
		roff("viaduct "+version), roff(p.Name), roff(p.About))
	for _, name := range p.Topics {
		t, _ := Find(topics, name)
		for _, b := range parse(t.Text) {
			b.man(&out)
		}
	}
	out.WriteString(".SH SEE ALSO\n")
	others := slices.DeleteFunc(slices.Clone(Pages), func(o Page) bool { return o.Name == p.Name })
	for i, o := range others {
		fmt.Fprintf(&out, ".BR %s (%s)%s\n", roff(o.Name), o.Section, map[bool]string{true: ","}[i < len(others)-1])
	}
	return out.String()
}

func (b *block) man(out *strings.Builder) {
	switch b.kind {
	case heading:
		fmt.Fprintf(out, ".SH %s\n", strings.ToUpper(roff(plain(b.text))))
	case subheading:
		fmt.Fprintf(out, ".SS %s\n", roff(plain(b.text)))
	case paragraph:
		fmt.Fprintf(out, ".PP\n%s\n", fonts(b.text))
	case item:
		if word, means, ok := term(b.text); ok {
			fmt.Fprintf(out, ".TP\n%s\n%s\n", fonts(word), fonts(means))
		} else {
			fmt.Fprintf(out, ".IP \\(bu 2\n%s\n", fonts(b.text))
		}
	case verbatim:
		fmt.Fprintf(out, ".PP\n.RS 4\n.nf\n%s\n.fi\n.RE\n", roff(strings.TrimSuffix(b.text, "\n")))
	}
}

// fonts sets what stands between backquotes in bold.
func fonts(s string) string {
	parts := strings.Split(roff(s), "`")
	var out strings.Builder
	for i, p := range parts {
		if i%2 == 1 {
			p = `\fB` + p + `\fR`
		}
		out.WriteString(p)
	}
	return out.String()
}

// roff keeps a text from being taken for requests.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

// Piece is what a text has to be typed or read as it stands.
type Piece struct {
	Host string // the last <!-- host: NAME --> above it: what its lines are tried on
	Text string
}

// Pieces returns what a text has to be typed or read as it stands.
func Pieces(text string) []Piece {
	var out []Piece
	name := ""
	for i, part := range strings.Split(text, "<!-- host: ") {
		if i > 0 {
			name, part, _ = strings.Cut(part, " -->")
		}
		for _, b := range parse(part) {
			if b.kind == verbatim {
				out = append(out, Piece{name, b.text})
			}
		}
	}
	return out
}
