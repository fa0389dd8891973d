// Command package builds a .deb and an .rpm of viaduct: it builds the program, has it write the other files of a
// package (viaduct install --root), and packs them.
//
//	hack/package [-version 1.2.0] [-arch amd64] [-out DIR]
package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/goreleaser/nfpm/v2"
	_ "github.com/goreleaser/nfpm/v2/deb"
	"github.com/goreleaser/nfpm/v2/files"
	_ "github.com/goreleaser/nfpm/v2/rpm"
)

const program = "/usr/sbin/viaduct"

func main() {
	version := flag.String("version", "", "the version; that of git, if it is left out")
	arch := flag.String("arch", runtime.GOARCH, "amd64 or arm64")
	out := flag.String("out", ".", "where the packages go")
	flag.Parse()
	if err := run(*version, *arch, *out); err != nil {
		fmt.Fprintln(os.Stderr, "package:", err)
		os.Exit(1)
	}
}

func run(version, arch, out string) error {
	work, err := os.MkdirTemp("", "package")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	source, commit := git("rev-parse", "--show-toplevel"), git("rev-parse", "--short=12", "HEAD")
	version = cmp.Or(version, strings.TrimPrefix(git("describe", "--tags", "--match=v*"), "v"), "0.0.0+"+commit)
	root := filepath.Join(work, "root")
	binary := filepath.Join(root, program)
	if err := build(source, binary, arch, "-X main.version="+version+" -X main.commit="+commit); err != nil {
		return err
	}

	// The other files are written by a program that runs here.
	here := filepath.Join(work, "here")
	if err := build(source, here, runtime.GOARCH, "-X main.version="+version); err != nil {
		return err
	}
	if err := do(work, nil, here, "install", "--root", root, "--program", program); err != nil {
		return err
	}
	for _, format := range []string{"deb", "rpm"} {
		name, err := pack(format, version, arch, source, root, work, out)
		if err != nil {
			return err
		}
		fmt.Println(name)
	}
	return nil
}

// git prints what git says of the checkout that this is run in; "" if it says nothing.
func git(args ...string) string {
	b, _ := exec.Command("git", args...).Output()
	return strings.TrimSpace(string(b))
}

func build(source, file, arch, flags string) error {
	env := []string{"CGO_ENABLED=0", "GOARCH=" + arch}
	return do(source, env, "go", "build", "-trimpath", "-ldflags", "-s -w "+flags, "-o", file, "./cmd/viaduct")
}

func do(dir string, env []string, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env, cmd.Stderr = dir, append(os.Environ(), env...), os.Stderr
	return cmd.Run()
}

// pack packs what is below root, and returns the package's name.
func pack(format, version, arch, source, root, work, out string) (string, error) {
	contents, err := contentsOf(format, source, root, work)
	if err != nil {
		return "", err
	}

	scripts := filepath.Join(source, "hack/package/scripts")
	info := nfpm.WithDefaults(&nfpm.Info{
		Name: "viaduct", Arch: arch, Platform: "linux", Version: version, VersionSchema: "none", Section: "admin",
		Priority: "optional", Maintainer: "The viaduct maintainers <maintainers@viaduct.invalid>",
		License: "Apache-2.0",
		Description: "device passthrough and SR-IOV on Linux\nIt shows the IOMMU groups of a host, takes devices " +
			"from the host's drivers and gives them back,\nmakes SR-IOV virtual functions at boot from one file, and " +
			"lends devices to guests.",
		Overridables: nfpm.Overridables{
			Contents: contents,
			// modprobe, and the names of devices.
			Depends:    map[string][]string{"deb": {"kmod"}, "rpm": {"kmod"}}[format],
			Recommends: map[string][]string{"deb": {"pci.ids"}, "rpm": {"hwdata"}}[format],
			Scripts: nfpm.Scripts{
				PostInstall: filepath.Join(scripts, "postinst"), PreRemove: filepath.Join(scripts, "prerm"),
				PostRemove: filepath.Join(scripts, "postrm"),
			},
		},
	})

	packager, err := nfpm.Get(format)
	if err != nil {
		return "", err
	}

	name := filepath.Join(out, packager.ConventionalFileName(info))
	f, err := os.Create(name)
	if err != nil {
		return "", err
	}

	if err := packager.Package(info, f); err != nil {
		f.Close()
		return "", err
	}

	return name, f.Close()
}

// contentsOf are the files below root, and those of the source that a package has. Manual pages are compressed, and
// completions for zsh are where the system of the format looks for them.
func contentsOf(format, source, root, work string) (files.Contents, error) {
	doc := "/usr/share/doc/viaduct/"
	all := files.Contents{
		{Source: filepath.Join(source, "README.md"), Destination: doc + "README.md"},
		{Source: filepath.Join(source, "LICENSE"), Destination: doc + "copyright"},
		{Source: filepath.Join(source, "CHANGELOG.md"), Destination: doc + "CHANGELOG.md"},
		{Source: filepath.Join(source, "hack/package/host.yaml"), Destination: doc + "examples/host.yaml"},
		{Destination: "/etc/viaduct", Type: files.TypeDir, FileInfo: &files.ContentFileInfo{Mode: 0o755}},
	}

	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		to := strings.TrimPrefix(name, root)
		switch {
		case strings.HasPrefix(to, "/usr/share/man/"):
			if name, err = compressed(name, work); err != nil {
				return err
			}
			to += ".gz"
		case format == "deb" && strings.HasPrefix(to, "/usr/share/zsh/site-functions/"):
			to = "/usr/share/zsh/vendor-completions/" + filepath.Base(to)
		}
		mode := fs.FileMode(0o644)
		if to == program {
			mode = 0o755
		}
		all = append(all, &files.Content{
			Source: name, Destination: to, FileInfo: &files.ContentFileInfo{Mode: mode, Owner: "root", Group: "root"},
		})
		return nil
	})

	return all, err
}

func compressed(name, work string) (string, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	w, _ := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if _, err := w.Write(b); err != nil {
		return "", err
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	to := filepath.Join(work, filepath.Base(name)+".gz")
	return to, os.WriteFile(to, out.Bytes(), 0o644)
}
