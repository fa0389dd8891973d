package main

import (
	"bytes"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// looks are lines of commands that change nothing, on a littered host.
var looks = []string{
	"list", "list --json", "list --tree", "list --tree -o wide", "list -o wide", "list --holders", "list --holders --tree", "list group=7",
	"show 0000:01:10.0", "show 0000:01:00.0 --json", "show 0000:07:01.0", "show group=7 --json", "show 0000:09:00.0",
	"why 0000:01:10.0", "why 0000:07:01.0 --json", "why group=7", "why --all",
	"why guest=web", "why guest=web --memory 1G --json",
	"iommu", "iommu --json",
	"doctor", "doctor 0000:01:00.0 --json", "vf list", "vf list --json", "vf list -o wide", "vf get 0000:01:00.0/vf0",
	"vf get 0000:01:00.0/vf1 --json",
	"log 0000:01:10.0", "log 8086:10ca", "why web", "show group=8", "why mac=52:54:00:00:00:01",
	"leases", "leases --json", "pool", "pool net --json", "pool net --format libvirt-network", "log", "log --json",
	"plan", "plan --json", "plan --steps", "status", "status -v", "status --json", "apply --dry-run", "adopt",
	"adopt --import systemd", "adopt --import modprobe",
	"bind --dry-run 0000:07:01.0", "bind --dry-run --json 0000:07:02.0", "unbind --dry-run 0000:01:10.4",
	"unbind --dry-run --json 0000:01:10.4",
	"vf create --dry-run 0000:02:00.0 2 vlan=7", "vf destroy --dry-run 0000:01:00.0",
	"vf set --dry-run 0000:02:00.0/vf0 vlan=9",
	"vf sync --dry-run", "vf sync --dry-run 0000:01:00.0", "assign --dry-run new --from 0000:02:00.0",
	"assign --dry-run new --from net --memory 1G --json",
	"assign --dry-run web --from net --vlan 7", "install --dry-run",
}

// Output of whatever command that could not be written is a failure.
func TestNothingCanBeWritten(t *testing.T) {
	k := littered(t)
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	var silent []string
	for _, line := range append([]string{"schema", "help", "help topics", "help gpu", "help bind", "version",
		"assign --formats"}, looks...) {
		usual := onKernel(k, strings.Fields(line)...)
		if usual.stdout == "" {
			silent = append(silent, line)
			continue
		}
		var stderr bytes.Buffer
		status := runOn(open, append([]string{"viaduct"}, strings.Fields(line)...), full{}, &stderr)
		if status == exitDone || status == exitDiffers || !strings.Contains(stderr.String(), io.ErrShortWrite.Error()) {
			t.Errorf("%s: exit status %d: %s", line, status, stderr.String())
		}
	}
	if len(silent) > 4 {
		t.Errorf("of these nothing is written anyway: %q", silent)
	}
}

// A guest that nobody could be told of has no devices.
func TestAssignedUnheard(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:00:08.0", sweptNIC, sweptEDU)
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	for _, format := range []string{"qemu", "json"} {
		var stderr bytes.Buffer
		status := runOn(open, strings.Fields("viaduct assign db --from "+sweptNIC+" --no-reset --format "+format), full{},
			&stderr)
		if status != exitFailed || !strings.Contains(stderr.String(), io.ErrShortWrite.Error()) ||
			k.Host().Exists("run/viaduct/lease-db.json") || boundTo(k, sweptNIC) != "e1000" {
			t.Errorf("%s: exit status %d: %s, on %s", format, status, stderr.String(), boundTo(k, sweptNIC))
		}
	}
	mustOnKernel(t, k, strings.Fields("assign db --from "+sweptNIC+" --no-reset")...)
}

// A look that fails is told: a command ends with an error or a note that it does not have otherwise, calls more unknown,
// or says what it says otherwise. What is absent, and what is free, is never what could not be looked at.
func TestLooksThatFail(t *testing.T) {
	k := littered(t)
	var all []hosttest.Operation
	var lines []string // of each operation
	var first []int    // its line's first one
	usual := map[string]answer{}
	for _, line := range looks {
		from := len(all)
		all = append(all, k.Operations(func() { usual[line] = saysNow(k, line) })...)
		if usual[line].status == exitUsage {
			t.Errorf("%s: %+v", line, usual[line])
		}
		for range len(all) - from {
			lines, first = append(lines, line), append(first, from)
		}
	}

	for _, n := range slices.Concat(ownSteps(all), hosttest.Sample(all)) {
		line, want := lines[n], usual[lines[n]]
		failed := k.FailNth(n-first[n], unix.EIO)
		got := saysNow(k, line)
		k.Revive()
		silent := got.status == want.status && got.stderr == want.stderr && got.stdout != want.stdout &&
			unknowns(got.stdout) <= unknowns(want.stdout) && !ids.MatchString(failed())
		// What is wrong with the host is not mended by not being seen, nor is nothing an answer.
		better := got.status == exitDone && want.status != exitDone
		nothing := got.status == want.status && saysNothing(got.stdout) && !saysNothing(want.stdout)
		if silent || better || nothing {
			t.Errorf("%s: %s fails, and it says (%d)\n%s%s\nnot (%d)\n%s", line, failed(), got.status, got.stdout, got.stderr,
				want.status, want.stdout)
		}
	}
}

var moment = regexp.MustCompile(`\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?|\b(\d+h)?(\d+m)?\d+s\b`)

var blanks = regexp.MustCompile(` +`)

// saysNow is what a command line says, but when.
func saysNow(k *hosttest.Kernel, line string) answer {
	a := onKernel(k, strings.Fields(line)...)
	a.stdout, a.stderr = moment.ReplaceAllString(a.stdout, "WHEN"), moment.ReplaceAllString(a.stderr, "WHEN")
	// A longer time takes a wider column.
	a.stdout = blanks.ReplaceAllString(a.stdout, " ")
	return a
}

var unknown = regexp.MustCompile(`unknown|not\s+known|null|input/output\s+error|\s-\s`)

// ids are for names, which stand beside what they name; and that a record is of this boot is seen by its place.
var ids = regexp.MustCompile(`pci\.ids$|^readlink run/viaduct/lease-`)

func unknowns(text string) int { return len(unknown.FindAllString(text, -1)) }
