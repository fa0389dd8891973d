package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/viaduct/docs"
	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// pageHosts are the hosts that commands of pages are run on, by the name that stands above them.
var pageHosts = map[string]func(testing.TB) *hosttest.Kernel{
	"desktop": hosttest.NewDesktop, "server": hosttest.NewServer, "": hosttest.NewServer,
}

// elsewhere are commands that no test here can run, as they end only when they are ended, start a VMM, or write to the
// machine that the tests run on: which function of hack/labtest, or job of the lab, runs them.
var elsewhere = map[string]string{
	"run": "hack/labtest/lease_test.go", "watch": "hack/lab.d/jobs/boot", "install": "hack/lab.d/jobs/boot",
	"uninstall": "hack/lab.d/jobs/boot", "verify": "hack/labtest/verify_test.go",
	"apply --confirm": "hack/labtest/declared_test.go", "apply --confirmed": "hack/labtest/declared_test.go",
	"adopt -o": "hack/labtest/declared_test.go", "adopt --import": "cmd/internal/declared/imports_test.go",
}

// Every command line of the manual and of the README is right, and prints what stands below it. -update writes that.
func TestPages(t *testing.T) {
	topics := docs.Topics(nil)

	files := map[string]string{"README.md": "../../README.md"}
	for _, topic := range topics {
		files[topic.Name] = filepath.Join("docs", topic.Name+".md")
	}

	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}

	for name, file := range files {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(root, "cmd/viaduct", file)
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			t.Chdir(t.TempDir())
			p := &page{t: t, name: name, root: root, text: string(b)}
			host := "none yet"
			for _, piece := range docs.Pieces(p.text) {
				if piece.Host != host {
					host = piece.Host
					p.k = pageHosts[host](t)
				}
				p.block(piece.Text)
			}
			if *update && p.text != string(b) {
				if err := os.WriteFile(file, []byte(p.text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// page is a page whose lines are run on one host, in their order.
type page struct {
	t          *testing.T
	name, root string
	k          *hosttest.Kernel
	text       string
}

func (p *page) block(block string) {
	first, _, _ := strings.Cut(block, "\n")
	switch {
	case slices.Contains([]string{"protect:", "pfs:", "devices:", "roles:"},
		strings.TrimSpace(strings.Split(first, " #")[0])):
		if _, err := hostfile.Parse(p.name, []byte(block)); err != nil {
			p.t.Errorf("%s:\n%v", block, err)
		}
		file := filepath.Join(p.k.Dir(), hostfile.File)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			p.t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(block), 0o600); err != nil {
			p.t.Fatal(err)
		}
		return
	case !strings.HasPrefix(first, "# ") && !strings.HasPrefix(first, "viaduct "):
		return
	}

	now := strings.Builder{}
	var typed string
	var want []string
	end := func() {
		if typed != "" {
			now.WriteString(p.line(typed, want))
		}
		want = nil
	}
	for line := range strings.Lines(block) {
		if strings.HasPrefix(line, "# ") || strings.HasPrefix(line, "viaduct ") {
			end()
			typed = line
		} else {
			want = append(want, line)
		}
	}
	end()
	if *update {
		p.text = strings.ReplaceAll(p.text, indent(block), indent(now.String()))
	}
}

func indent(block string) string {
	var out strings.Builder
	for line := range strings.Lines(block) {
		out.WriteString(strings.TrimRight("    "+line, " \n") + "\n")
	}
	return out.String()
}

// line runs one line, and compares what it prints with what stands below it; it returns both as they are to be.
func (p *page) line(typed string, want []string) string {
	p.t.Helper()
	commands, said := splitLine(strings.TrimPrefix(strings.TrimSpace(typed), "# ")), ""
	for _, words := range commands {
		if words[0] != "viaduct" {
			continue
		}
		if err := knownWords(words); err != nil {
			p.t.Errorf("%s: %v", typed, err)
			continue
		}
		if file, is := notHere(words); is {
			p.runsElsewhere(words[1], file)
			return typed + strings.Join(want, "")
		}
		text, status := p.run(words)
		if status != exitDone && len(want) == 0 {
			p.t.Errorf("%s: exit status %d: %s", typed, status, text)
		}
		said += text
	}

	if len(want) == 0 || len(commands) == 1 && commands[0][0] != "viaduct" {
		return typed + strings.Join(want, "")
	}
	if !like(want, said) && !*update {
		p.t.Errorf("%sprints\n%snot\n%s", typed, said, strings.Join(want, ""))
	}

	if slices.ContainsFunc(want, func(l string) bool { return strings.TrimSpace(l) == "..." }) {
		if !like(want, said) {
			p.t.Errorf("%sprints\n%snot\n%s", typed, said, strings.Join(want, ""))
		}
		return typed + strings.Join(want, "")
	}

	return typed + said
}

// like reports whether a text is these lines, where a line of three dots stands for any number of lines.
func like(want []string, text string) bool {
	if len(want) == 0 {
		return text == ""
	}
	if strings.TrimSpace(want[0]) == "..." {
		for rest := text; ; {
			if like(want[1:], rest) {
				return true
			}
			_, after, more := strings.Cut(rest, "\n")
			if !more {
				return false
			}
			rest = after
		}
	}
	line, rest, _ := strings.Cut(text, "\n")
	return strings.TrimRight(line, " ") == strings.TrimRight(want[0], " \n") && text != "" && like(want[1:], rest)
}

// run runs a command of the program on the page's host, or on a captured one that it names.
func (p *page) run(words []string) (said string, status int) {
	open := func(name string) (*iommu.Host, error) {
		if name != "" {
			return iommu.Open(name)
		}
		h, err := host.Fake(p.k.Dir(), p.k)
		return &iommu.Host{Host: h}, err
	}
	var out bytes.Buffer
	status = runOn(open, words, &out, &out)
	return out.String(), status
}

// runsElsewhere checks that what is not run here is run by the lab.
func (p *page) runsElsewhere(command, file string) {
	b, err := os.ReadFile(filepath.Join(p.root, file))
	if err != nil || !strings.Contains(string(b), command) {
		p.t.Errorf("%s does not run %s: %v", file, command, err)
	}
}

func notHere(words []string) (file string, is bool) {
	for what, file := range elsewhere {
		command, flag, _ := strings.Cut(what, " ")
		if slices.Contains(words, command) && (flag == "" || slices.Contains(words, flag)) {
			return file, true
		}
	}
	return "", false
}

// splitLine cuts a line as a shell does, as far as lines of the manual need that: into commands of words, each without
// what it reads and writes.
func splitLine(line string) (commands [][]string) {
	var words []string
	end := func() {
		if len(words) > 0 {
			commands = append(commands, words)
		}
		words = nil
	}

	fields := strings.Fields(line)
	for i := 0; i < len(fields); i++ {
		switch f := fields[i]; {
		case f == "|":
			// What reads is no command of ours.
			end()
			return commands
		case f == "&&":
			end()
		case f == ">":
			i++
		case f == "#":
			end()
			return commands
		case strings.HasPrefix(f, "$("):
			words = append(words, strings.TrimPrefix(f, "$("))
		default:
			words = append(words, strings.Trim(f, `'"`))
		}
	}

	end()
	return commands
}

// knownWords checks that a command line names a command that there is, with flags that it has.
func knownWords(words []string) error {
	app := newApp(&env{})
	flags, commands := app.Flags, app.Commands
	for i := 1; i < len(words); i++ {
		word := words[i]
		if word == "--" {
			return nil
		}
		if strings.HasPrefix(word, "-") && len(word) > 1 {
			name, _, _ := strings.Cut(strings.TrimLeft(word, "-"), "=")
			known := func(f cli.Flag) bool { return slices.Contains(f.Names(), name) }
			if !slices.ContainsFunc(flags, known) && name != "help" {
				return fmt.Errorf("there is no flag %s", word)
			}
			if takesValue(flags, word) {
				i++
			}
			continue
		}
		at := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(word) })
		if at >= 0 {
			flags, commands = commands[at].Flags, commands[at].Subcommands
			continue
		}
		if i == 1 {
			return fmt.Errorf("there is no command %s", word)
		}
		commands = nil
	}

	return nil
}

// proseOf is a text without what is printed in it.
func proseOf(text string) string {
	for _, piece := range docs.Pieces(text) {
		text = strings.ReplaceAll(text, indent(piece.Text), "")
	}
	return docs.Text(text)
}

// The examples of each command's help name commands and flags that there are, and each help fits a terminal.
func TestHelp(t *testing.T) {
	app := newApp(&env{})
	check := func(name, text string, commands bool) {
		t.Helper()
		for line := range strings.Lines(text) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > docs.Width &&
				strings.Contains(strings.TrimSpace(line), " ") {
				t.Errorf("%s: %d columns: %s", name, n, line)
			}
			if typed, ok := strings.CutPrefix(line, "    viaduct "); ok && commands {
				for _, words := range splitLine("viaduct " + typed) {
					if err := knownWords(words); words[0] == "viaduct" && err != nil {
						t.Errorf("%s: %s: %v", name, line, err)
					}
				}
			}
		}
	}

	check("viaduct", docs.Text(appHelp(app)), false)
	var walk func(name string, commands []*cli.Command)
	walk = func(name string, commands []*cli.Command) {
		for _, c := range commands {
			check(c.Name, docs.Text(commandHelp(name+" "+c.Name, c)), true)
			walk(name+" "+c.Name, c.Subcommands)
		}
	}

	walk("viaduct", app.Commands)
	topics := manual(app)

	for _, topic := range topics {
		check(topic.Name, proseOf(topic.Text), false)
	}
}

// Each topic is printed, and is in the list; each manual page has all of its topics.
func TestManual(t *testing.T) {
	app := newApp(&env{})
	topics := manual(app)
	for _, topic := range topics {
		var out bytes.Buffer
		if status := run([]string{"viaduct", "help", topic.Name}, &out, &out); status != 0 || out.Len() == 0 {
			t.Errorf("help %s: exit status %d: %s", topic.Name, status, out.String())
		}
		if strings.Contains(topic.Text, "- ``:") || strings.Contains(topic.About, "Description") {
			t.Errorf("%s (%s): a part of it has no name", topic.Name, topic.About)
		}
		if strings.Contains(topic.Text, "{{") {
			t.Errorf("%s: nothing makes %s", topic.Name, topic.Text[strings.Index(topic.Text, "{{"):])
		}
	}
	for _, p := range docs.Pages {
		if text := manPage(app, p); !strings.HasPrefix(text, ".TH ") {
			t.Errorf("%s: %s", p.Name, text)
		}
		for _, name := range p.Topics {
			if _, known := docs.Find(topics, name); !known {
				t.Errorf("%s: there is no topic %s", p.Name, name)
			}
		}
	}
	var out bytes.Buffer
	if status := run([]string{"viaduct", "help", "nonsense"}, &out, &out); status != exitUsage {
		t.Errorf("help nonsense: exit status %d: %s", status, out.String())
	}
	out.Reset()
	if status := run([]string{"viaduct", "vf"}, &out, &out); status != 0 ||
		!strings.Contains(out.String(), "destroy    remove") {
		t.Errorf("vf alone: exit status %d: %s", status, out.String())
	}
}
