package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"viaduct/internal/host/hosttest"
)

// on runs a command line on a tree, and returns all that it said.
func on(t *testing.T, dir, line string) (stdout, all string) {
	t.Helper()
	var out, stderr bytes.Buffer
	status := run(append([]string{"viaduct", "--host", dir}, strings.Fields(line)...), &out, &stderr)
	all = fmt.Sprintf("%s== stderr\n%s== exit status %d\n", out.String(), stderr.String(), status)
	return out.String(), strings.ReplaceAll(all, dir, "HOST")
}

// cutConfig is a tree as a plain user captures it: config space ends after 64 bytes.
func cutConfig(tree hosttest.Tree) hosttest.Tree {
	out := tree.With(nil)
	for name, content := range out {
		if path.Base(name) == "config" {
			out[name] = content[:64]
		}
	}
	return out
}

// override is a tree whose kernel was told to take two functions for isolated.
func override(t *testing.T, tree hosttest.Tree) hosttest.Tree {
	t.Helper()
	const device = "sys/devices/pci0000:00/0000:00:09.0/0000:0c:00.1"
	old, ok := strings.CutPrefix(tree[device+"/iommu_group"], "-> ../../../../kernel/iommu_groups/")
	link := "sys/kernel/iommu_groups/" + old + "/devices/0000:0c:00.1"
	if !ok || tree[link] == "" {
		t.Fatalf("%s is in group %q", device, old)
	}
	return tree.With(hosttest.Tree{
		"proc/cmdline":          "root=/dev/vda pcie_acs_override=downstream,multifunction\n",
		device + "/iommu_group": "-> ../../../../kernel/iommu_groups/99",
		link:                    hosttest.Gone,
		"sys/kernel/iommu_groups/99/devices/0000:0c:00.1": tree[link],
		"sys/kernel/iommu_groups/99/type":                 "DMA\n",
	})
}

// TestGoldenWhy runs why on a captured host of the lab: as a folder and a snapshot, with part of config space, and with
// groups that config space does not give.
func TestGoldenWhy(t *testing.T) {
	whole := hosttest.Load(t, filepath.Join(machines, "why.txt"))
	bare := hosttest.Load(t, filepath.Join(machines, "bare.txt"))
	late := whole.With(hosttest.Tree{
		"sys/class/iommu/ivhd0": hosttest.Gone, "sys/class/iommu/smmu3.0x9050000": whole["sys/class/iommu/ivhd0"],
	})
	for name, c := range map[string]struct {
		tree hosttest.Tree
		line string
	}{
		"bare":           {bare, "why 00:01.0"},
		"bare.json":      {bare, "why 00:01.0 --json"},
		"late":           {late, "why 00:04.0"},
		"port":           {whole, "why 00:06.0"},
		"alone":          {whole, "why 01:00.0"},
		"vf":             {whole, "why 05:00.0/vf1"},
		"switch":         {whole, "why 0a:00.0"},
		"conventional":   {whole, "why 0b:02.0"},
		"functions":      {whole, "why 0c:00.1"},
		"functions.json": {whole, "why 0c:00.1 --json"},
		"ports":          {whole, "why 00:10.1"},
		"acs-off":        {whole, "why 10:00.0"},
		"chipset":        {whole, "why 00:1f.3"},
		"none":           {whole, "why 00:04.0"},
		"none.json":      {whole, "why 00:04.0 --json"},
		"all.json":       {whole, "why --all --json"},
		"part":           {cutConfig(whole), "why 0c:00.1"},
		"part.json":      {cutConfig(whole), "why 0c:00.1 --json"},
		"override":       {override(t, whole), "why 0c:00.1"},
		"override.json":  {override(t, whole), "why 0c:00.1 --json"},
		"no-selector":    {whole, "why"},
		"no-device":      {whole, "why 00:0b.0"},
		"no-group":       {whole, "why group=77"},
		"too-many":       {whole, "why class=0200"},
	} {
		for kind, dir := range map[string]string{"folder": c.tree.Dir(t), "snapshot": c.tree.Snapshot(t)} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				stdout, all := on(t, dir, c.line)
				if strings.HasSuffix(name, ".json") && !json.Valid([]byte(stdout)) {
					t.Errorf("no valid JSON:\n%s", stdout)
				}
				compareGolden(t, filepath.Join("testdata", "why", name+".golden"), all)
				for line := range strings.Lines(stdout) {
					if n := len([]rune(strings.TrimSuffix(line, "\n"))); !json.Valid([]byte(stdout)) && n > 80 {
						t.Errorf("a line of %d columns: %s", n, line)
					}
				}
			})
		}
	}
}

// Every group of the captured host is computed as the kernel has it; with part of config space none is said to differ.
func TestWhyAll(t *testing.T) {
	whole := hosttest.Load(t, filepath.Join(machines, "why.txt"))
	for name, tree := range map[string]hosttest.Tree{"whole": whole, "part": cutConfig(whole)} {
		stdout, _ := on(t, tree.Dir(t), "why --all --json")
		var v struct {
			Groups []struct {
				Group             int
				Members, Computed []string
				Agrees            *bool
			}
		}
		if err := json.Unmarshal([]byte(stdout), &v); err != nil || len(v.Groups) < 20 {
			t.Fatalf("%s: %v, %d groups", name, err, len(v.Groups))
		}
		for _, g := range v.Groups {
			switch {
			case g.Agrees == nil && (name == "whole" || g.Computed != nil), g.Agrees != nil && !*g.Agrees,
				g.Agrees != nil && !slices.Equal(g.Members, g.Computed):
				t.Errorf("%s: %+v", name, g)
			}
		}
	}
}

// list and its like read no config space: that wakes devices, and takes long. why of one device reads that of those
// alone that matter.
func TestConfigUnread(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	read := func(line string) []string {
		var mu sync.Mutex
		var of []string
		k.SetFault(func(_, name string) error {
			if path.Base(name) == "config" {
				mu.Lock()
				defer mu.Unlock()
				of = append(of, path.Base(path.Dir(name)))
			}
			return nil
		})
		mustOnKernel(t, k, strings.Fields(line)...)
		slices.Sort(of)
		return slices.Compact(of)
	}
	for _, line := range []string{"list", "list --tree", "list --json", "show group=7", "leases"} {
		if of := read(line); len(of) > 0 {
			t.Errorf("%s reads config space of %v", line, of)
		}
	}
	if of, want := read("why 02:10.0"), []string{"0000:00:06.0"}; !slices.Equal(of, want) {
		t.Errorf("why reads config space of %v, want %v", of, want)
	}
}

// guestLines are the answers of a guest's checklist, by name and device.
func guestLines(t *testing.T, k *hosttest.Kernel, line ...string) map[string]string {
	t.Helper()
	var v struct {
		Guest string
		Lines []struct {
			Name     string
			Device   *string
			Answer   string
			Text     string
			Evidence []struct{ File, Value *string }
			Cure     *string
		}
	}
	a := mustOnKernel(t, k, append(line, "--json")...)
	if err := json.Unmarshal([]byte(a.stdout), &v); err != nil {
		t.Fatalf("%v: %s", err, a.stdout)
	}
	out := map[string]string{}
	for _, l := range v.Lines {
		what := l.Name
		if l.Device != nil {
			what += " " + *l.Device
		}
		out[what] = l.Answer + ": " + l.Text
		if l.Answer == "no" && l.Cure == nil {
			t.Errorf("%s: %s, and nothing mends it", what, l.Text)
		}
	}
	return out
}

// A guest's checklist finds what is wrong with it, and names what mends it.
func TestWhyGuest(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	const vf = "0000:02:10.0"
	mustOnKernel(t, k, "assign", "web", "--from", vf)
	text := mustOnKernel(t, k, "why", "guest=web").stdout
	for line := range strings.Lines(text) {
		if len([]rune(line)) > 81 {
			t.Errorf("a line of %d columns: %s", len([]rune(line)), line)
		}
	}
	t.Log(text)
	got := guestLines(t, k, "why", "web")
	for what, want := range map[string]string{
		"iommu": "ok:", "interrupts": "ok:", "present " + vf: "ok:", "group " + vf: "ok:", "driver " + vf: "ok:",
		"nodes " + vf: "ok:", "lease": "ok: the lease is reserved", "change": "ok:", "holders": "ok:", "memlock": "unknown:",
		"quarantine": "ok:", "last_change": "ok:",
	} {
		if !strings.HasPrefix(got[what], want) {
			t.Errorf("%s: %q, want %s", what, got[what], want)
		}
	}

	k.Process(4711, "qemu-system-x86_64", "/dev/vfio/devices/vfio0")
	put(t, k, "proc/4711/cmdline", "qemu-system-x86_64\x00-m\x004G\x00")
	put(t, k, "proc/4711/status", "Name:\tqemu\nCapEff:\t0000000000000000\n")
	put(t, k, "proc/4711/limits", "Max locked memory         8388608              8388608              bytes\n")
	got = guestLines(t, k, "why", "guest=web")
	for what, want := range map[string]string{
		"lease": "ok: the lease is active", "memory " + vf: "ok:", "memlock": "no: process 4711 may lock 8 MiB",
		"holders": "ok: the guest has its devices open",
	} {
		if !strings.HasPrefix(got[what], want) {
			t.Errorf("with a VMM: %s: %q, want %s", what, got[what], want)
		}
	}
	file := filepath.Join(t.TempDir(), "host.tar.gz")
	mustOnKernel(t, k, "snapshot", file)
	stdout, all := on(t, file, "why guest=web")
	for _, want := range []string{"ok       " + vf + " driver:", "unknown  lease:", "unknown  holders:"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("of a snapshot, it lacks %q:\n%s", want, all)
		}
	}
	if a := onKernel(k, "why", "guest=db"); a.status != exitFailed || !strings.Contains(a.stderr, "web") {
		t.Errorf("%+v", a)
	}
}

// put writes a file of a fake kernel's host behind its back.
func put(t *testing.T, k *hosttest.Kernel, name, content string) {
	t.Helper()
	file := filepath.Join(k.Dir(), name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// Each thing that can be wrong is found, and nothing else is said to be wrong.
func TestWhyGuestFaults(t *testing.T) {
	const (
		vf    = "0000:02:10.0"
		group = "sys/kernel/iommu_groups/18/"
	)
	for what, c := range map[string]struct {
		change func(t *testing.T, k *hosttest.Kernel)
		also   []string
	}{
		"driver " + vf: {func(t *testing.T, k *hosttest.Kernel) {
			if err := k.Write("sys/bus/pci/drivers/vfio-pci/unbind", vf); err != nil {
				t.Fatal(err)
			}
		}, nil},
		"memory " + vf: {func(t *testing.T, k *hosttest.Kernel) {
			put(t, k, group+"reserved_regions", "0x0000000000100000 0x00000000001fffff direct\n")
		}, nil},
		"change " + vf: {func(t *testing.T, k *hosttest.Kernel) {
			put(t, k, "run/viaduct/change-"+vf+".json", `{"op":"take","unit":["`+vf+`"]}`)
		}, nil},
		"kernel " + vf: {func(t *testing.T, k *hosttest.Kernel) {
			put(t, k, "dev/kmsg", "4,1,1,-;AMD-Vi: Event logged [IO_PAGE_FAULT device="+vf+" domain=0x0001]\n")
		}, nil},
		"interrupts": {func(t *testing.T, k *hosttest.Kernel) {
			chips, err := filepath.Glob(filepath.Join(k.Dir(), "sys/kernel/irq/*/chip_name"))
			if err != nil || len(chips) == 0 {
				t.Fatal(chips, err)
			}
			for _, c := range chips {
				if err := os.WriteFile(c, []byte("IO-APIC\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}, nil},
		"present " + vf: {func(t *testing.T, k *hosttest.Kernel) {
			put(t, k, "sys/bus/pci/devices/"+vf+"/modalias", "pci:v00001234d00005678sv00000000sd00000000bc02sc00i00\n")
		}, []string{"lease"}},
	} {
		t.Run(what, func(t *testing.T) {
			k := hosttest.NewLab(t, nil)
			mustOnKernel(t, k, "assign", "web", "--from", vf)
			c.change(t, k)
			lines := guestLines(t, k, "why", "guest=web")
			for name, line := range lines {
				wrong := strings.HasPrefix(line, "no:")
				if name == what && !wrong {
					t.Errorf("%s: %s", name, line)
				}
				if name != what && wrong && !slices.Contains(c.also, name) {
					t.Errorf("%s is wrong, and %s says %s", what, name, line)
				}
			}
		})
	}
}

// Who has a device open and is not who its lease is for is told of.
func TestWhyGuestOthers(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	const vf = "0000:02:10.0"
	k.Process(4711, "qemu-system-x86_64")
	mustOnKernel(t, k, "assign", "web", "--from", vf, "--owner-pid", "4711")
	k.Process(4712, "thief", "/dev/vfio/18")
	a := mustOnKernel(t, k, "why", "guest=web").stdout
	if !strings.Contains(a, "no       "+vf+" holders:") || !strings.Contains(a, "cure: kill 4712") {
		t.Error(a)
	}
}

// A bare name that is both a guest and a device is refused, and both are named.
func TestWhyAmbiguous(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	mustOnKernel(t, k, "assign", "enp1s0", "--from", "0000:02:10.0")
	a := onKernel(k, "why", "enp1s0")
	if a.status != exitUsage || !strings.Contains(a.stderr, "guest=enp1s0") || !strings.Contains(a.stderr, "0000:01:00.0") {
		t.Errorf("%+v", a)
	}
	mustOnKernel(t, k, "why", "guest=enp1s0")
	mustOnKernel(t, k, "why", "0000:01:00.0")
}
