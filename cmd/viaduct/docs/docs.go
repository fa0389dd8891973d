// Package docs is the manual: topics, written in a little Markdown, and what prints them on a terminal and as manual
// pages. The program embeds it; nothing is read from the host.
//
// A topic consists of headings (# and ##), paragraphs, items (- ) and, indented by four spaces, what is typed or read
// as it stands. `Code` stands between backquotes. A line {{NAME}} is replaced by text that the program makes of its own
// tables, so that the manual lists what there is. A line <!-- host: NAME --> is for the tests that run its commands.
package docs

import (
	"embed"
	"slices"
	"strings"
)

//go:embed *.md
var files embed.FS

// Topic is a part of the manual.
type Topic struct {
	Name  string // of the file, without .md
	About string // its first heading, or what the manual page is about that begins with it
	Text  string
}

// Page is a manual page.
type Page struct {
	Name    string
	Section string
	About   string
	Topics  []string // whose texts it has, in this order
}

// Pages are the manual pages.
var Pages = []Page{
	{"viaduct", "8", "device passthrough and SR-IOV on Linux", []string{
		"overview", "commands", "selectors", "safety", "groups", "bind", "vfs", "guests", "migrate", "formats", "files",
		"needs",
		"limits",
	}},
	{"host.yaml", "5", "the PFs, VFs and passthrough devices of a host, for viaduct", []string{"host.yaml", "boot"}},
	{"viaduct-json", "5", "what viaduct prints with --json", []string{"json"}},
}

// Topics are all topics by name, with the made texts put in.
func Topics(made map[string]string) []Topic {
	entries, _ := files.ReadDir(".") // the program has them in it
	out := make([]Topic, 0, len(entries))
	for _, e := range entries {
		b, _ := files.ReadFile(e.Name())
		text := string(b)
		for name, m := range made {
			text = strings.ReplaceAll(text, "{{"+name+"}}\n", m)
		}
		name := strings.TrimSuffix(e.Name(), ".md")
		about, _, _ := strings.Cut(strings.TrimPrefix(text, "# "), "\n")
		for _, p := range Pages {
			if p.Topics[0] == name {
				// Its heading is that of a page's first section.
				about = p.About
			}
		}
		out = append(out, Topic{Name: name, About: about, Text: text})
	}
	return out
}

// Find returns the topic of that name.
func Find(topics []Topic, name string) (Topic, bool) {
	i := slices.IndexFunc(topics, func(t Topic) bool { return t.Name == name })
	if i < 0 {
		return Topic{}, false
	}
	return topics[i], true
}
