package main

import (
	"cmp"
	"fmt"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/install"
	"viaduct/cmd/viaduct/docs"
)

// packageOptions are what a package has where.
type packageOptions struct{ root, units, program string }

// runPackage writes the files of a package.
func runPackage(e *env, app *cli.App, o *packageOptions) error {
	if e.hostName != "" {
		return usagef("install: --root and --host cannot be combined")
	}
	for _, name := range []string{o.units, o.program} {
		if !filepath.IsAbs(name) {
			return usagef("install: %s: want an absolute path", name)
		}
	}
	files := append(install.Packaged(o.program, o.units), documents(app)...)
	if e.dryRun {
		if err := install.PackageFits(cmp.Or(o.root, "."), files); err != nil {
			return err
		}
		p := previewFiles(files)
		p.of("writes " + count(len(files), "file") + " below " + cmp.Or(o.root, "."))
		for _, f := range files {
			p.says(f.Path)
		}
		e.preview(p)
		return nil
	}
	names, err := install.WritePackage(cmp.Or(o.root, "."), files)
	for _, name := range names {
		fmt.Fprintln(e.stdout, name)
	}
	return err
}

// documents are the manual pages and the completion scripts, where a system looks for them.
func documents(app *cli.App) []install.File {
	const share = "/usr/share/"
	all := []install.File{
		{Path: share + "bash-completion/completions/viaduct", Content: bashCompletion},
		{Path: share + "zsh/site-functions/_viaduct", Content: zshCompletion},
		{Path: share + "fish/vendor_completions.d/viaduct.fish", Content: fishCompletion},
	}
	for _, p := range docs.Pages {
		all = append(all, install.File{Path: share + "man/man" + p.Section + "/" + p.Name + "." + p.Section,
			Content: manPage(app, p)})
	}
	for i := range all {
		all[i].Mode = 0o644
	}
	return all
}

// previewFiles are files as commands that would write them.
func previewFiles(files []install.File) *preview {
	p := &preview{what: "file"}
	for _, f := range files {
		if f.Link != "" {
			p.does(fmt.Sprintf("ln -s %s %s", f.Link, f.Path))
		} else {
			p.does(fmt.Sprintf("cat > %s <<'END'\n%sEND", f.Path, f.Content))
		}
	}
	return p
}
