package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"viaduct/cmd/viaduct/docs"
)

// shapes are turns of phrase that readers stumble over, with what says the same plainly.
var shapes = []struct{ wrong, right string }{
	{`\b(is|are|was|were) no [a-z]`, "is not a ..., invalid ..., unknown ..."},
	{`\b(is|are) none\b`, "is not a ..."},
	{`, as [0-9/]|, as [a-z_]+=|\bas [0-9]+[A-Z]\b|, as [a-z0-9]+/`, "e.g."},
	{`\bwhat is declared of\b|\bdeclared of it\b`, "the declared configuration"},
	{`\b(is|are) to be\b|\b(has|have) to be\b|\b(is|are) to have\b`, "must be, must have"},
	{`\banew\b`, "again"},
	{`\bnobody's\b|\bsomebody's\b`, "belongs to nobody"},
	{`\bmend(s|ed)?\b`, "fix"},
	{`\bcannot be had\b|\bcan be had\b`, "cannot have"},
	{`\b(is|are|was|were) told\b|\btells? of\b|\bdoes not tell\b`, "report, say"},
	{`\bby way of\b|\bin the midst of\b|\bbut for\b`, "with, while, except"},
	{`\ball that\b|\ball of which\b|\bthat which\b`, "everything"},
	{`\bof (its|their) own\b`, "its own ..."},
	{`\bbooks\b`, "records"},
	{`\bnames (no|none)\b|\bnothing (resets|tells)\b|\bknows no\b`, "does not name, nothing can, does not know"},
	{`\bno other is taken\b|\bis taken over\b`, "say who does what"},
}

var compiled = func() []*regexp.Regexp {
	var out []*regexp.Regexp
	for _, s := range shapes {
		out = append(out, regexp.MustCompile(s.wrong))
	}
	return out
}()

// rightAnyway are turns that look like one of the shapes and are right.
var rightAnyway = regexp.MustCompile(`\b(there|There) (is|are|was|were) no\b|\bno longer\b|\bno such\b|\bis no [A-Z]`)

func checkWords(t *testing.T, where, text string) {
	t.Helper()
	text = rightAnyway.ReplaceAllString(text, "-")
	for i, shape := range compiled {
		if found := shape.FindString(text); found != "" {
			t.Errorf("%s: %q; better: %s:\n%s", where, found, shapes[i].right, text)
		}
	}
}

// Help, manual, errors and notes are plain English.
func TestWords(t *testing.T) {
	app := newApp(&env{})
	topics := manual(app)
	for _, topic := range topics {
		checkWords(t, "topic "+topic.Name, proseOf(topic.Text))
	}
	for _, file := range []string{"README.md", "SECURITY.md", "CONTRIBUTING.md"} {
		b, err := os.ReadFile("../../" + file)
		if err != nil {
			t.Fatal(err)
		}
		checkWords(t, file, string(b))
	}
	checkWords(t, "help", appHelp(app))

	err := filepath.WalkDir("../..", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "hack" || d.Name() == "hosttest" || d.Name() == ".git"):
			return fs.SkipDir
		case strings.HasSuffix(name, ".go") && !strings.HasSuffix(name, "_test.go"):
			wordsOf(t, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// wordsOf checks each text of a source file that is long enough to be a sentence, put together from its parts, and the
// help of keys of host.yaml.
func wordsOf(t *testing.T, name string) {
	t.Helper()
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, name, nil, 0)
	if err != nil {
		t.Fatal(err)
	}

	var text func(e ast.Expr) string
	text = func(e ast.Expr) string {
		switch e := e.(type) {
		case *ast.BasicLit:
			if s, err := strconv.Unquote(e.Value); err == nil && e.Kind == token.STRING {
				return s
			}
		case *ast.BinaryExpr:
			return text(e.X) + text(e.Y)
		}
		return "X"
	}

	ast.Inspect(file, func(n ast.Node) bool {
		e, ok := n.(ast.Expr)
		if !ok {
			return true
		}
		switch e.(type) {
		case *ast.BasicLit, *ast.BinaryExpr:
		default:
			return true
		}
		if s := text(e); strings.Count(s, " ") >= 2 {
			checkWords(t, set.Position(e.Pos()).String(), s)
		}
		return false
	})
}

// README is short, leads on, and names the two commands that try everything.
func TestREADME(t *testing.T) {
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if n := len(strings.Fields(string(b))); n > 700 {
		t.Errorf("README has %d words", n)
	}

	for _, name := range []string{"README.md", "CONTRIBUTING.md"} {
		b, err := os.ReadFile("../../" + name)
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range regexp.MustCompile(`\]\(([^)#:]+)\)`).FindAllStringSubmatch(string(b), -1) {
			if _, err := os.Stat("../../" + link[1]); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}

	topics := docs.Topics(nil)

	for _, topic := range topics {
		if file := topic.Name + ".md"; !strings.Contains(string(b), file) && !inPage(topic.Name) {
			t.Errorf("neither README nor a manual page leads to %s", file)
		}
	}

	for _, command := range []string{"    hack/demo ", "    hack/test "} {
		if !strings.Contains(string(b), command) {
			t.Errorf("README does not name %s", command)
		}
	}
}

func inPage(topic string) bool {
	for _, p := range docs.Pages {
		if slices.Contains(p.Topics, topic) {
			return true
		}
	}
	return false
}
