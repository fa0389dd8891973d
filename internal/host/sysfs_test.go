package host_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host"
)

// What is read of this machine's sysfs, by calls of its own, is what Go's library reads.
func TestSysfs(t *testing.T) {
	h, err := host.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	const net = "sys/class/net"
	entries, err := os.ReadDir("/" + net)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, e := range entries {
		want = append(want, e.Name())
	}
	names, err := h.Names(net)
	if slices.Sort(names); err != nil || !slices.Equal(names, want) {
		t.Errorf("%v, %v, want %v", names, err, want)
	}

	target, err := os.Readlink("/" + net + "/lo")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := h.Link(net + "/lo"); err != nil || got != target {
		t.Errorf("%q, %v, want %q", got, err, target)
	}
	text, err := os.ReadFile("/" + net + "/lo/address")
	if err != nil {
		t.Fatal(err)
	}
	want1 := strings.TrimSpace(string(text))
	for how, read := range map[string]func(string) (string, error){"steady": h.Steady, "string": h.String} {
		if got, err := read(net + "/lo/address"); err != nil || got != want1 {
			t.Errorf("%s: %q, %v, want %q", how, got, err, want1)
		}
		if got, err := read(net + "/lo/not"); !host.Absent(err) {
			t.Errorf("%s: what is not there: %q, %v", how, got, err)
		}
		if got, err := read(net + "/lo/statistics"); err == nil {
			t.Errorf("%s: a directory was read: %q", how, got)
		}
	}

	dir, err := h.Open(net + "/lo")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if got, err := dir.Steady("address"); err != nil || got != want1 {
		t.Errorf("below: %q, %v", got, err)
	}
	long := strings.Repeat("x", 300)
	if _, err := h.Steady(net + "/" + long); err == nil {
		t.Error("a name that is too long was read")
	}
	if _, err := h.Link(net + "/" + long); err == nil {
		t.Error("a name that is too long is a link")
	}
	if _, err := h.Link(net + "/lo/address"); err == nil {
		t.Error("a file is a link")
	}
	if _, err := h.Names(net + "/lo/address"); err == nil {
		t.Error("a file has names")
	}
}

// A file that is larger than a page is read whole, and from anywhere.
func TestLargeFile(t *testing.T) {
	h, err := host.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	file := filepath.Join(t.TempDir(), "large")
	content := strings.Repeat("0123456789", 1<<10)
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(file, "/")
	if got, err := h.Read(name); err != nil || string(got) != content {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	f, err := h.File(name)
	if err != nil || f.Size() != int64(len(content)) {
		t.Fatalf("%v, %v", f, err)
	}
	defer f.Close()
	b := make([]byte, 10)
	if _, err := f.ReadAt(b, 10000); err != nil || string(b) != "0123456789" {
		t.Errorf("%q, %v", b, err)
	}
}

// A file that cannot be made or replaced is told, and leaves nothing behind.
func TestReplaceFails(t *testing.T) {
	h, err := host.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}

	below := strings.TrimPrefix(dir, "/")
	if err := h.Replace(below+"/file/in", []byte("x")); err == nil {
		t.Error("a file was made below a file")
	}
	if err := os.MkdirAll(filepath.Join(dir, "taken", "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := h.Replace(below+"/taken", []byte("x")); err == nil {
		t.Error("a directory was replaced by a file")
	}
	if err := h.Remove(below + "/taken"); err == nil {
		t.Error("a directory was removed as a file")
	}
	if err := h.Own(below+"/not", -1, -1, 0o600); err == nil {
		t.Error("what is not there has an owner")
	}
	if fd, err := h.OpenNode(below+"/not", 0); err == nil || fd >= 0 {
		t.Errorf("what is not there was opened: %d", fd)
	}
	if _, _, err := h.DeviceNumber(below + "/not"); err == nil {
		t.Error("what is not there has a number")
	}
	if _, err := h.Open(below + "/not"); err == nil {
		t.Error("what is not there was opened")
	}
	if _, err := h.File(below + "/not"); err == nil {
		t.Error("what is not there is a file")
	}
	if _, err := h.Read(below + "/not"); err == nil {
		t.Error("what is not there was read")
	}
	if _, err := h.Int(below + "/file"); err == nil {
		t.Error("an empty file is a number")
	}
	if _, err := h.Ioctl(-1, "lo", 0, nil); err == nil {
		t.Error("an ioctl of no number was made")
	}
	if _, err := h.InUse(below + "/file/in"); err == nil {
		t.Error("what is below a file is not in use")
	}

	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("left: %v, %v", entries, err)
	}
}
