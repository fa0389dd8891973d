package iommu

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// A snapshot that is redacted has no address and no serial number of the host's any more, and what names a device by
// one still names it.
func TestRedacted(t *testing.T) {
	const mac, serial = "52:54:00:00:00:02", "01-02-03-04-05-06-07-08"
	tree := join(rich(), hosttest.Tree{
		"proc/cmdline": "BOOT_IMAGE=/vmlinuz root=UUID=secret intel_iommu=on vfio-pci.ids=10de:1b80 password=hunter2\n",
		"etc/viaduct/host.yaml": "# Alice's host\npfs:\n  - {select: \"mac=" + strings.ToUpper(mac) +
			"\", count: 2}\n" +
			"devices:\n  - select: serial=" + serial + "\n",
		"var/lib/viaduct/log.jsonl":                        `{"user":"alice"}` + "\n",
		"var/lib/viaduct/known-serial=" + serial + ".json": `{"serial":"` + serial + `","macs":["` + mac + `"]}` + "\n",
	})
	h := hostOf(t, tree)
	var whole, out bytes.Buffer
	if err := Capture(h, &whole); err != nil {
		t.Fatal(err)
	}
	if err := CaptureRedacted(h, &out); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "host.tar.gz")
	if err := os.WriteFile(file, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	got := hosttest.FromSnapshot(t, file)
	for name, content := range got {
		for _, secret := range []string{mac, strings.ToUpper(mac), serial, "secret", "hunter2", "lice"} {
			if strings.Contains(content, secret) || strings.Contains(name, secret) {
				t.Errorf("%s has %q: %q", name, secret, content)
			}
		}
	}
	if line := got["proc/cmdline"]; line != "intel_iommu=on vfio-pci.ids=10de:1b80\n" {
		t.Errorf("the command line: %q", line)
	}

	masked, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer masked.Close()
	top, err := Scan(masked)
	if err != nil {
		t.Fatal(err)
	}
	yaml := got["etc/viaduct/host.yaml"]
	for _, key := range []string{"mac=", "serial="} {
		_, rest, _ := strings.Cut(yaml, key)
		word := key + rest[:strings.IndexAny(rest, "\"\n")]
		sel, err := ParseSelector(word)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := sel.One(masked, top); err != nil || d.Name != "0000:01:00.0" {
			t.Errorf("%s: %v, %v", word, d, err)
		}
	}
}

func FuzzRedact(f *testing.F) {
	f.Add("a 52:54:00:00:00:02 b 52:54:00:00:00:02:03")
	f.Fuzz(func(t *testing.T, text string) {
		r := &redactor{numbers: map[string]string{}}
		once := r.text(text)
		if again := r.file("x/config", []byte(text)); len(again) != len(text) {
			t.Error("config space has another length")
		}
		left := &redactor{numbers: map[string]string{}}
		left.text(once)
		for address := range left.numbers {
			if !strings.HasPrefix(address, "02:00:00:") {
				t.Errorf("%q is left of %q", address, text)
			}
		}
	})
}
