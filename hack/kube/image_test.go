//go:build lab

package kube

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"slices"
)

// image is what all pods are made of, the sandboxes too.
const image = "viaduct.test/pod:1"

// A file of an image: what it holds, or where it links to.
type file struct {
	name    string
	content []byte
	link    string
}

// podFiles are busybox with its links, and links by which programs of the host run, if the host's /usr is mounted.
func podFiles() []file {
	program, err := os.ReadFile(programs + "/busybox")
	if err != nil {
		panic(err)
	}
	list, err := exec.Command(programs+"/busybox", "--list").Output()
	if err != nil {
		panic(err)
	}
	files := []file{
		{name: "bin/busybox", content: program}, {name: "lib", link: "usr/lib"}, {name: "lib64", link: "usr/lib64"},
	}
	for name := range bytes.FieldsSeq(list) {
		if string(name) != "busybox" {
			files = append(files, file{name: "bin/" + string(name), link: "busybox"})
		}
	}
	return files
}

// loadImage gives containerd an image, in the form that docker saves one in.
func loadImage(name string, files []file, entryPoint ...string) error {
	layer := archive(files)
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Env": []string{"PATH=/bin"}, "Entrypoint": entryPoint},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer)}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]map[string]any{
		{"Config": digest(config) + ".json", "RepoTags": []string{name}, "Layers": []string{"layer.tar"}},
	})
	if err != nil {
		return err
	}
	cmd := exec.Command(programs+"/ctr", "--address", socket, "--namespace", "k8s.io", "images", "import", "-")
	cmd.Stdin = bytes.NewReader(archive([]file{
		{name: digest(config) + ".json", content: config}, {name: "layer.tar", content: layer},
		{name: "manifest.json", content: manifest},
	}))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("import the image %s: %w: %s", name, err, out)
	}
	return nil
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// archive is a tar archive of the files and the folders that they are in.
func archive(files []file) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	write := func(h *tar.Header, content []byte) {
		h.Mode = 0o755
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		if _, err := w.Write(content); err != nil {
			panic(err)
		}
	}
	var made []string
	for _, f := range files {
		if dir := path.Dir(f.name); dir != "." && !slices.Contains(made, dir) {
			made = append(made, dir)
			write(&tar.Header{Name: dir, Typeflag: tar.TypeDir}, nil)
		}
		if f.link != "" {
			write(&tar.Header{Name: f.name, Typeflag: tar.TypeSymlink, Linkname: f.link}, nil)
			continue
		}
		write(&tar.Header{Name: f.name, Typeflag: tar.TypeReg, Size: int64(len(f.content))}, f.content)
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}
