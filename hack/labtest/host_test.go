//go:build lab

// Package labtest holds the proofs that run inside lab hosts (hack/lab), on a real kernel, as root. What viaduct says
// and does is judged by the kernel's own files, read here by other means than viaduct's, and by lspci. `hack/test` runs
// them.
package labtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The lab puts everything into the folder it runs the tests in.
const viaduct = "/job/viaduct"

const (
	devicesDir = "/sys/bus/pci/devices"
	groupsDir  = "/sys/kernel/iommu_groups"
)

// result is what one run of a program came to.
type result struct {
	stdout, stderr string
	status         int
}

// patience is how long a program may take: more than the longest write, less than a host has.
const patience = 5 * time.Minute

// running is what runs, and what each task waits for in the kernel.
func running() string {
	out, _ := exec.Command("ps", "-eLo", "pid,tid,ppid,stat,wchan:24,args").CombinedOutput()
	return string(out)
}

func run(t *testing.T, name string, args ...string) result {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Cancel = func() error {
		t.Logf("%s %s does not end; what runs:\n%s", name, args, running())
		return cmd.Process.Kill()
	}
	cmd.WaitDelay = time.Second // for what it started, and left with its output
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exited *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exited) {
		t.Fatalf("%s: %v", name, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// do runs viaduct, which must succeed.
func do(t *testing.T, args ...string) string {
	t.Helper()
	r := run(t, viaduct, args...)
	if r.status != 0 {
		t.Fatalf("viaduct %s: exit status %d\n%s%s\nkernel log:\n%s", strings.Join(args, " "), r.status, r.stdout,
			r.stderr, kernelLog(t))
	}
	return r.stdout
}

func kernelLog(t *testing.T) string {
	lines := strings.Split(run(t, "dmesg").stdout, "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// shell runs a command line, which must succeed. Where there is only busybox it has to do without what bash alone can.
func shell(t *testing.T, line string) string {
	t.Helper()
	program := "bash"
	if _, err := exec.LookPath(program); err != nil {
		program = "sh"
	}
	r := run(t, program, "-euc", line)
	if r.status != 0 {
		t.Fatalf("%s: exit status %d\n%s%s", line, r.status, r.stdout, r.stderr)
	}
	return strings.TrimSpace(r.stdout)
}

func decode(t *testing.T, text string, into any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	if err := d.Decode(into); err != nil {
		t.Fatalf("JSON: %v\n%s", err, text)
	}
}

// attr is a sysfs attribute, "" if it is not there.
func attr(elements ...string) string {
	b, err := os.ReadFile(filepath.Join(elements...))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// link is the last element of a link's target, "" if it is not there.
func link(elements ...string) string {
	target, err := os.Readlink(filepath.Join(elements...))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

func names(elements ...string) []string {
	entries, err := os.ReadDir(filepath.Join(elements...))
	if err != nil {
		return nil
	}
	out := []string{}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func orNull(s string) any {
	if s == "" || s == "(null)" {
		return nil
	}
	return s
}

// device is a device as `list --json` must show it, read from the kernel's files one by one.
func device(name string) map[string]any {
	dir := filepath.Join(devicesDir, name)
	d := map[string]any{
		"address":         name,
		"vendor":          strings.TrimPrefix(attr(dir, "vendor"), "0x"),
		"device":          strings.TrimPrefix(attr(dir, "device"), "0x"),
		"class":           strings.TrimPrefix(attr(dir, "class"), "0x"),
		"driver":          orNull(link(dir, "driver")),
		"driver_override": orNull(attr(dir, "driver_override")),
		"numa_node":       nil,
		"netdevs":         []any{},
		"physfn":          orNull(link(dir, "physfn")),
		"vf_index":        nil,
		"sriov":           nil,
	}

	d["role"] = "guest"
	switch class := d["class"].(string); {
	case strings.HasPrefix(class, "0604"):
		d["role"] = "port"
	case strings.HasPrefix(class, "06"), strings.HasPrefix(class, "08"), strings.HasPrefix(class, "0c05"):
		d["role"] = "companion"
	}

	if n, err := strconv.Atoi(attr(dir, "numa_node")); err == nil && n >= 0 {
		d["numa_node"] = float64(n)
	}

	for _, pattern := range []string{"net/*", "virtio*/net/*"} {
		found, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, f := range found {
			d["netdevs"] = append(d["netdevs"].([]any), filepath.Base(f))
		}
	}

	if total, err := strconv.Atoi(attr(dir, "sriov_totalvfs")); err == nil {
		enabled, _ := strconv.Atoi(attr(dir, "sriov_numvfs"))
		d["sriov"] = map[string]any{"total": float64(total), "enabled": float64(enabled)}
	}

	for i := range 256 {
		if d["physfn"] != nil && link(dir, "physfn", fmt.Sprintf("virtfn%d", i)) == name {
			d["vf_index"] = float64(i)
		}
	}

	return d
}

// fingerprint is all that a command which must change nothing could have changed.
func fingerprint() string {
	var b strings.Builder
	for _, n := range names(devicesDir) {
		dir := filepath.Join(devicesDir, n)
		fmt.Fprintln(&b, n, link(dir, "driver"), attr(dir, "driver_override"), attr(dir, "sriov_numvfs"),
			attr(dir, "sriov_drivers_autoprobe"), names(dir, "net"))
	}
	return b.String()
}

// bound says which driver has a device, "" for none.
func bound(name string) string { return link(devicesDir, name, "driver") }

// vfs are the addresses of a PF's VFs by index, by the kernel's links.
func vfs(pf string) []string {
	out := []string{}
	for i := 0; ; i++ {
		a := link(devicesDir, pf, fmt.Sprintf("virtfn%d", i))
		if a == "" {
			return out
		}
		out = append(out, a)
	}
}

// byDriver are the devices a driver has, in order.
func byDriver(driver string) []string {
	var out []string
	for _, n := range names("/sys/bus/pci/drivers", driver) {
		if strings.Contains(n, ":") {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}
