package main

import (
	"bytes"
	"os"
	"runtime/debug"
	"strings"
	"testing"
)

// The version comes from the linker, else from the module, and the commit from what the compiler wrote down.
func TestVersion(t *testing.T) {
	info := &debug.BuildInfo{GoVersion: "go1.26", Settings: []debug.BuildSetting{
		{Key: "vcs.revision", Value: "0123456789abcdef"}, {Key: "vcs.time", Value: "2026-11-26T10:00:00Z"},
		{Key: "vcs.modified", Value: "true"},
	}}
	info.Main.Version = "v1.2.0"
	if got := describeBuild(info).String(); got != "v1.2.0 (commit 0123456789ab with changes, 2026-11-26T10:00:00Z, go1.26)" {
		t.Error(got)
	}
	version, commit = "1.3", "abc"
	defer func() { version, commit = "", "" }()
	if got := describeBuild(info).String(); got != "1.3 (commit abc, go1.26)" {
		t.Error(got)
	}
	if got := describeBuild(&debug.BuildInfo{}).String(); got != "1.3 (commit abc)" {
		t.Error(got)
	}
	for _, line := range [][]string{{"viaduct", "version"}, {"viaduct", "--version"}} {
		var out bytes.Buffer
		if status := run(line, &out, &out); status != 0 || !strings.HasPrefix(out.String(), "viaduct 1.3 (commit abc") {
			t.Errorf("%q: %d, %s", line, status, out.String())
		}
	}
}

// Each command has its help, wherever --help stands on the line.
func TestHelpOption(t *testing.T) {
	for line, want := range map[string]string{
		"--help": "viaduct: device passthrough", "-h": "viaduct: device passthrough",
		"list --help": "Usage: viaduct list", "show 01:00.0 -h": "Usage: viaduct show",
		"vf --help":        "Usage: viaduct vf COMMAND",
		"vf create --help": "Usage: viaduct vf create", "pool net --help": "Usage: viaduct pool",
		"--host /nowhere list -h":           "Usage: viaduct list",
		"vf create 01:00.0 2 vlan=5 --help": "Usage: viaduct vf create",
	} {
		var out, errs bytes.Buffer
		status := run(append([]string{"viaduct"}, strings.Fields(line)...), &out, &errs)
		if status != 0 || errs.Len() != 0 || !strings.HasPrefix(out.String(), want) {
			t.Errorf("viaduct %s: exit status %d, %q, %.60q", line, status, errs.String(), out.String())
		}
	}
}

// A package has everything that install does not make for one host alone.
func TestPackageFiles(t *testing.T) {
	root := t.TempDir()
	var out bytes.Buffer
	line := []string{"viaduct", "install", "--root", root, "--unit-dir", "/lib/systemd/system"}
	status := run(append(line, "--dry-run"), &out, &out)
	made, err := os.ReadDir(root)
	if status != 0 || !strings.Contains(out.String(), "/lib/systemd/system/viaduct.service") || len(made) > 0 ||
		err != nil {
		t.Errorf("exit status %d, %v, and there is %v: %s", status, err, made, out.String())
	}
	out.Reset()
	if status := run(line, &out, &out); status != 0 {
		t.Fatalf("exit status %d: %s", status, out.String())
	}
	for _, file := range []string{
		"/lib/systemd/system/viaduct.service", "/usr/lib/udev/rules.d/72-viaduct.rules",
		"/usr/share/man/man8/viaduct.8",
		"/usr/share/man/man5/host.yaml.5", "/usr/share/man/man5/viaduct-json.5",
		"/usr/share/bash-completion/completions/viaduct", "/usr/share/zsh/site-functions/_viaduct",
		"/usr/share/fish/vendor_completions.d/viaduct.fish",
	} {
		if !strings.Contains(out.String(), root+file+"\n") {
			t.Errorf("%s is missing:\n%s", file, out.String())
		}
	}
	for _, line := range [][]string{
		{"viaduct", "install", "--program", "/x"}, {"viaduct", "--host", root, "install", "--root", root},
		{"viaduct", "install", "--root", root, "--program", "x"},
	} {
		if status := run(line, &out, &out); status != exitUsage {
			t.Errorf("%q: exit status %d", line, status)
		}
	}
}
