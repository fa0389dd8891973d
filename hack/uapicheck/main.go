// Command uapicheck prints a C program that compares the numbers and structures of a Go package with those of the same
// names in linux/vfio.h and linux/iommufd.h:
//
//	uapicheck DIR
//
// DIR is the package's folder. The C program prints what differs, with both values, or else how much it compared, and
// its status is 1 if something differs. Only what is exported is compared, and nothing that a comment marks which
// begins with "newer", or with the name and "is newer".
package main

import (
	"bufio"
	"fmt"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"log"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"unicode"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("uapicheck: ")
	if len(os.Args) != 2 {
		log.Fatal("usage: uapicheck DIR")
	}
	p, err := load(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	out := bufio.NewWriter(os.Stdout)
	p.program(out)
	if err := out.Flush(); err != nil {
		log.Fatal(err)
	}
}

// loaded is a package with its sizes on amd64. A struct is laid out the same on every 64-bit machine.
type loaded struct {
	files []*ast.File
	info  types.Info
	sizes types.Sizes
}

func load(dir string) (*loaded, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	p := &loaded{info: types.Info{Defs: map[*ast.Ident]types.Object{}}, sizes: types.SizesFor("gc", "amd64")}
	fset := token.NewFileSet()
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		p.files = append(p.files, f)
	}
	if len(p.files) == 0 {
		return nil, fmt.Errorf("no Go files in %s", dir)
	}
	config := types.Config{Importer: importer.ForCompiler(fset, "source", nil), Sizes: p.sizes}
	_, err = config.Check(dir, fset, p.files, &p.info)
	return p, err
}

const head = `#include <stddef.h>
#include <stdio.h>
#include <linux/iommufd.h>
#include <linux/vfio.h>

static const struct row {
	enum { NUMBER, SIZE, OFFSET } kind;
	const char *name;
	long long go, c;
} rows[] = {
#define N(name, go) {NUMBER, #name, go, (long long)(name)},
/* A structure whose last fields are newer has in C its size with them or, in older headers, without. */
#define S(name, go, older) \
	{SIZE, "sizeof struct " #name, sizeof(struct name) == older ? older : go, sizeof(struct name)},
#define F(name, field, offset, size) \
	{OFFSET, "offsetof struct " #name "." #field, offset, offsetof(struct name, field)}, \
	{SIZE, "sizeof struct " #name "." #field, size, sizeof ((struct name *)0)->field},
`

const tail = `};

int main(void)
{
	int count[3] = {0}, differ = 0;
	for (const struct row *r = rows; r < rows + sizeof rows / sizeof *rows; r++) {
		count[r->kind]++;
		if (r->go == r->c)
			continue;
		differ = 1;
		printf("%%s: %%lld (0x%%llx) in Go, %%lld (0x%%llx) in C\n", r->name, r->go, r->go, r->c, r->c);
	}
	if (!differ)
		printf("compared %%d numbers, %%d sizes and %%d offsets; left out as newer: %d\n", count[0], count[1], count[2]);
	return differ;
}
`

// program writes the C program.
func (p *loaded) program(out *bufio.Writer) {
	skipped := 0
	fmt.Fprint(out, head)
	for _, f := range p.files {
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, s := range g.Specs {
				switch s := s.(type) {
				case *ast.ValueSpec:
					skipped += p.numbers(out, s)
				case *ast.TypeSpec:
					skipped += p.structure(out, s, newer(s.Name.Name, g.Doc, s.Doc))
				}
			}
		}
	}
	fmt.Fprintf(out, tail, skipped)
}

// numbers writes a row for each exported constant of a line, and returns how many of them are newer.
func (p *loaded) numbers(out *bufio.Writer, s *ast.ValueSpec) (skipped int) {
	for _, name := range s.Names {
		c, ok := p.info.Defs[name].(*types.Const)
		switch {
		case !ok || !c.Exported():
		case newer(name.Name, s.Comment, s.Doc):
			skipped++
		default:
			fmt.Fprintf(out, "N(%s, %s)\n", c.Name(), constant.ToInt(c.Val()).ExactString())
		}
	}
	return skipped
}

// structure writes a row for an exported struct, and one for each of its fields, and returns how many of these are
// newer. The fields are those of the type, but only the syntax has their comments.
func (p *loaded) structure(out *bufio.Writer, s *ast.TypeSpec, isNewer bool) (skipped int) {
	syntax, ok := s.Type.(*ast.StructType)
	if !ok || !s.Name.IsExported() {
		return 0
	}
	if isNewer {
		return 1
	}

	t := p.info.Defs[s.Name].Type().Underlying().(*types.Struct)
	fields := make([]*types.Var, t.NumFields())
	for i := range fields {
		fields[i] = t.Field(i)
	}

	offsets := p.sizes.Offsetsof(fields)
	cName := snake(s.Name.Name)
	size := p.sizes.Sizeof(t)
	older := size
	i := 0
	for _, f := range syntax.Fields.List {
		for range f.Names {
			field := fields[i]
			switch {
			case field.Name() == "_":
			case newer(field.Name(), f.Comment, f.Doc):
				skipped++
				older = min(older, offsets[i])
			default:
				older = size // it is not newer to the end
				name := reflect.StructTag(t.Tag(i)).Get("c")
				if name == "" {
					name = snake(field.Name())
				}
				fmt.Fprintf(out, "F(%s, %s, %d, %d)\n", cName, name, offsets[i], p.sizes.Sizeof(field.Type()))
			}
			i++
		}
	}

	fmt.Fprintf(out, "S(%s, %d, %d)\n", cName, size, older)
	return skipped
}

// newer tells whether one of the comments on a name has the mark.
func newer(name string, comments ...*ast.CommentGroup) bool {
	for _, c := range comments {
		text := strings.TrimPrefix(strings.TrimSpace(c.Text()), name+" is ")
		word, _, _ := strings.Cut(text, " ")
		if strings.TrimRight(word, ".,:;\n") == "newer" {
			return true
		}
	}
	return false
}

// snake is C's spelling of a name.
func snake(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
