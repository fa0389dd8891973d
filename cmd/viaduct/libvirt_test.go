package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// hook runs the hook as libvirt does, with a domain on standard input.
func hook(t *testing.T, k *hosttest.Kernel, domain string, args ...string) (status int, said string) {
	t.Helper()
	return hookWith(t, k, domain, append([]string{"--"}, args...)...)
}

// hookWith is hook with options before what libvirt passes.
func hookWith(t *testing.T, k *hosttest.Kernel, domain string, args ...string) (status int, said string) {
	t.Helper()
	return typedIn(t, k, domain, append([]string{"libvirt-hook"}, args...)...)
}

// typedIn runs a line that reads a text on standard input.
func typedIn(t *testing.T, k *hosttest.Kernel, text string, line ...string) (status int, said string) {
	t.Helper()
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := out.WriteString(text); err != nil {
		t.Fatal(err)
	}
	out.Close()
	defer func(was *os.File) { os.Stdin = was }(os.Stdin)
	os.Stdin = in
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	var stdout, stderr bytes.Buffer
	status = runOn(open, append([]string{"viaduct"}, line...), &stdout, &stderr)
	return status, stdout.String() + stderr.String()
}

// A domain with devices does not start by files that cannot be read, unless something else was in force; what concerns
// nothing of ours ends at once, whatever is wrong, and a domain's name is no option.
func TestHookOfBrokenFile(t *testing.T) {
	const (
		plain = "<domain type='kvm'><name>web</name></domain>"
		with  = "<domain type='kvm'><name>web</name><devices><hostdev mode='subsystem' type='pci' managed='no'><source>" +
			"<address domain='0x0000' bus='0x01' slot='0x10' function='0x0'/></source></hostdev></devices></domain>"
	)
	k := hosttest.NewLab(t, nil)
	file := filepath.Join(k.Dir(), hostfile.File)
	err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte("pfs: [ {"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		domain string
		args   []string
		fails  bool
	}{
		{with, []string{"web", "prepare", "begin", "-"}, true},
		{with, []string{"web", "start", "begin", "-"}, true},
		{with, []string{"web", "release", "end", "-"}, false},
		{with, []string{"web", "reconnect", "begin", "-"}, false},
		{with, []string{"web", "migrate", "begin", "-"}, true},
		{plain, []string{"web", "migrate", "begin", "-"}, false},
		{plain, []string{"web", "prepare", "begin", "-"}, false},
		{plain, []string{"--", "prepare", "begin", "-"}, false},
		{with, []string{"--help", "prepare", "begin", "-"}, true},
	} {
		if status, said := hook(t, k, c.domain, c.args...); (status != 0) != c.fails {
			t.Errorf("%q: status %d, %s", c.args, status, said)
		}
	}

	// A lease that cannot be read may be of any device: what has some does not start, and what has none does.
	put(t, k, "run/viaduct/lease-web.json", "{")
	if status, said := hook(t, k, with, "web", "prepare", "begin", "-"); status == 0 {
		t.Errorf("with a lease that cannot be read: %s", said)
	}
	if status, said := hook(t, k, plain, "web", "prepare", "begin", "-"); status != 0 || said == "" {
		t.Errorf("without devices: status %d, %s", status, said)
	}
	if status, said := hook(t, k, "<domain", "web", "prepare", "begin", "-"); status == 0 {
		t.Errorf("what is no domain: %s", said)
	}
	put(t, k, "run/viaduct/lease-web.json", "")
	if err := os.Remove(filepath.Join(k.Dir(), "run/viaduct/lease-web.json")); err != nil {
		t.Fatal(err)
	}

	if err := declared.Of(&iommu.Host{Host: k.Host()}).Ended(&hostfile.Host{}); err != nil {
		t.Fatal(err)
	}
	if status, said := hook(t, k, with, "web", "prepare", "begin", "-"); status != 0 {
		t.Errorf("by what was confirmed last: status %d, %s", status, said)
	}
}
