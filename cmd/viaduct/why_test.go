package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
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

// merged is a tree in which ports have no ACS on, and each is in one group with the functions below it, as the kernel would
// have them.
func merged(t *testing.T, tree hosttest.Tree, port string) hosttest.Tree {
	t.Helper()
	const root = "sys/devices/pci0000:00/"
	group := path.Base(tree[root+port+"/iommu_group"])
	out := tree.With(nil)
	config := []byte(tree[root+port+"/config"])
	at := 0x100
	for at != 0 && binary.LittleEndian.Uint16(config[at:]) != 0x000d {
		at = int(binary.LittleEndian.Uint16(config[at+2:]) >> 4)
	}
	if at == 0 {
		t.Fatalf("%s has no ACS", port)
	}
	copy(config[at+6:], "\x00\x00")
	out[root+port+"/config"] = string(config)
	for name, link := range tree {
		dir, ok := strings.CutSuffix(name, "/iommu_group")
		if !ok || path.Dir(dir) != root+port {
			continue
		}
		device := path.Base(dir)
		old := "sys/kernel/iommu_groups/" + path.Base(link) + "/devices/" + device
		out["sys/kernel/iommu_groups/"+group+"/devices/"+device] = tree[old]
		delete(out, old)
		out[name] = strings.TrimSuffix(link, path.Base(link)) + group
	}
	return out
}

// many is a tree with a card of eight functions in the place of one with two.
func many(tree hosttest.Tree) hosttest.Tree {
	const from = "sys/devices/pci0000:00/0000:00:09.0/0000:0c:00.1"
	out := tree.With(nil)
	for f := 2; f < 8; f++ {
		device := fmt.Sprintf("0000:0c:00.%d", f)
		for name, content := range tree {
			if rest, ok := strings.CutPrefix(name, from+"/"); ok {
				out[path.Dir(from)+"/"+device+"/"+rest] = content
			}
		}
		out["sys/bus/pci/devices/"+device] = strings.ReplaceAll(tree["sys/bus/pci/devices/0000:0c:00.1"],
			"0000:0c:00.1", device)
		out["sys/kernel/iommu_groups/18/devices/"+device] = strings.ReplaceAll(
			tree["sys/kernel/iommu_groups/18/devices/0000:0c:00.1"], "0000:0c:00.1", device)
	}
	return out
}

// behindVMD is a host with a disk behind a Volume Management Device.
func behindVMD() hosttest.Tree {
	return hosttest.Made(
		hosttest.PCI{At: "0000:00:0e.0", ID: "8086:467f", Class: "010400", Group: 6, Driver: "vmd"},
		hosttest.PCI{At: "0000:00:0e.0/pci10000:e0/10000:e0:06.0", ID: "8086:09ab", Class: "060400", Group: 6,
			Driver: "pcieport"},
		hosttest.PCI{At: "0000:00:0e.0/pci10000:e0/10000:e0:06.0/10000:e1:00.0", ID: "144d:a808", Class: "010802",
			Group: 6, Driver: "nvme"},
	)
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
		"bare":      {bare, "why 00:01.0"},
		"bare-all":  {bare, "why --all"},
		"no-table":  {whole.With(hosttest.Tree{"sys/firmware/acpi/tables/IVRS": hosttest.Gone}), "why 0c:00.1"},
		"bad-table": {whole.With(hosttest.Tree{"sys/firmware/acpi/tables/IVRS": "IVRS"}), "why 0c:00.1"},
		"no-config": {whole.With(hosttest.Tree{"sys/devices/pci0000:00/0000:00:09.0/config": hosttest.Gone}),
			"why 0c:00.1"},
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
		"functions-many": {many(whole), "why 0c:00.1"},
		"functions-open": {merged(t, whole, "0000:00:09.0"), "why 0c:00.1"},
		"vmd":            {behindVMD(), "why 10000:e1:00.0"},
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
			Hint     *string `json:"cure"`
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
		if l.Answer == "no" && l.Hint == nil {
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
		"nodes " + vf: "unknown: its nodes are there", "lease": "ok: the lease is reserved", "change": "ok:",
		"holders": "ok:", "memlock": "unknown:",
		"quarantine": "ok:", "last_change": "ok:",
	} {
		if !strings.HasPrefix(got[what], want) {
			t.Errorf("%s: %q, want %s", what, got[what], want)
		}
	}

	k.Process(4711, "qemu-system-x86_64", "/dev/vfio/devices/vfio0")
	put(t, k, "proc/4711/cmdline", "qemu-system-x86_64\x00-name\x00guest=web,debug-threads=on\x00-m\x004G\x00")
	put(t, k, "proc/4711/status", "Name:\tqemu\nCapEff:\t0000000000000000\n")
	put(t, k, "proc/4711/limits", "Max locked memory         8388608              8388608              bytes\n")
	got = guestLines(t, k, "why", "guest=web")
	for what, want := range map[string]string{
		"lease": "ok: the lease is active", "memory " + vf: "ok:", "memlock": "no: process 4711 may lock 8 MiB",
		"holders": "ok: the guest has its devices open", "nodes " + vf: "ok: its nodes are there",
	} {
		if !strings.HasPrefix(got[what], want) {
			t.Errorf("with a VMM: %s: %q, want %s", what, got[what], want)
		}
	}
	file := filepath.Join(t.TempDir(), "host.tar.gz")
	mustOnKernel(t, k, "snapshot", file)
	stdout, all := on(t, file, "why guest=web")
	for _, want := range []string{"ok       " + vf + " driver:", "ok       lease: the lease is active",
		"ok       holders: the guest has its"} {
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
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755),
		os.WriteFile(file, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// Each thing that can be wrong is found, and nothing else is said to be wrong.
func TestWhyGuestFaults(t *testing.T) {
	const (
		vf    = "0000:02:10.0"
		group = "sys/kernel/iommu_groups/18/"
		later = "4000000000000000" // in microseconds since the boot
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
			put(t, k, "dev/kmsg", "4,1,"+later+",-;AMD-Vi: Event logged [IO_PAGE_FAULT device="+vf+" domain=0x0001]\n")
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
	if a.status != exitUsage || !strings.Contains(a.stderr, "guest=enp1s0") ||
		!strings.Contains(a.stderr, "0000:01:00.0") {
		t.Errorf("%+v", a)
	}
	mustOnKernel(t, k, "why", "guest=enp1s0")
	mustOnKernel(t, k, "why", "0000:01:00.0")
}

// Where neither the lease nor a process says whose it is, a process that has a device open is not taken for the guest.
func TestWhyGuestStrangers(t *testing.T) {
	const vf = "0000:02:10.0"
	for name, c := range map[string]struct {
		lines map[int]string // command lines of QEMUs, by PID
		other bool           // something that is no VMM has it open too
		want  string
	}{
		"a QEMU without a name": {map[int]string{4711: "-m\x004G\x00"}, false, "unknown: "},
		"the guest": {map[int]string{4711: "-name\x00guest=web\x00"}, false,
			"ok: the guest has its devices open"},
		"the guest and a stranger": {map[int]string{4711: "-name\x00guest=web\x00"}, true, "unknown: "},
		"another guest":            {map[int]string{4711: "-name\x00guest=db\x00"}, false, "no: another uses it: "},
		"a QEMU and a stranger":    {map[int]string{4711: "-m\x004G\x00"}, true, "unknown: "},
		"two QEMUs, one of them ours": {map[int]string{4711: "-name\x00web\x00", 4713: "-m\x004G\x00"}, false,
			"unknown: "},
	} {
		t.Run(name, func(t *testing.T) {
			k := hosttest.NewLab(t, nil)
			mustOnKernel(t, k, "assign", "web", "--from", vf)
			for pid, line := range c.lines {
				k.Process(pid, "qemu-system-x86_64", "/dev/vfio/18")
				put(t, k, fmt.Sprintf("proc/%d/cmdline", pid), "qemu-system-x86_64\x00"+line)
			}
			if c.other {
				k.Process(4712, "cat", "/dev/vfio/18")
			}
			var got string
			for what, line := range guestLines(t, k, "why", "guest=web") {
				if strings.HasPrefix(what, "holders") {
					got = line
				}
			}
			if !strings.HasPrefix(got, c.want) {
				t.Errorf("holders: %q, want %q", got, c.want)
			}
		})
	}
}

// A VMM that a wrapper of the lease's owner has started is the guest.
func TestWhyGuestWrapper(t *testing.T) {
	for parent, want := range map[int]string{4710: "ok: the guest has its devices open", 1: "no: another uses it"} {
		k := hosttest.NewLab(t, nil)
		k.Process(4710, "sh")
		mustOnKernel(t, k, "assign", "web", "--from", "0000:02:10.0", "--owner-pid", "4710")
		put(t, k, "proc/4711/stat", fmt.Sprintf("4711 (a ) S) S %d 1 1 0 -1 0 1 0 0 0 0 0 0 0 20 0 1 0 5000 0 0 0\n",
			parent))
		k.Process(4711, "qemu-system-x86_64", "/dev/vfio/18")
		got := ""
		for what, line := range guestLines(t, k, "why", "guest=web") {
			if strings.HasPrefix(what, "holders") {
				got = line
			}
		}
		if !strings.HasPrefix(got, want) {
			t.Errorf("below %d: %q, want %q", parent, got, want)
		}
	}
}

// The limit of a process that may be anybody's says nothing of the guest.
func TestWhyGuestStrangersLimit(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	mustOnKernel(t, k, "assign", "web", "--from", "0000:02:10.0")
	k.Process(4712, "cat", "/dev/vfio/18")
	put(t, k, "proc/4712/limits", "Max locked memory         unlimited              unlimited              bytes\n")
	if got := guestLines(t, k, "why", "guest=web")["memlock"]; !strings.HasPrefix(got,
		"unknown: no process of the guest") {
		t.Error(got)
	}
}

// The nodes' owner is compared with who the guest's process runs as.
func TestWhyGuestNodes(t *testing.T) {
	const vf = "0000:02:10.0"
	status := func(uid int) string {
		return fmt.Sprintf("Uid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\nGid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\nCapEff:\t0\n", uid)
	}
	for name, c := range map[string]struct {
		status string
		opened bool
		want   string
	}{
		"root":                     {status(0), false, "ok: its nodes are there, for root alone"},
		"another user":             {status(107), false, "no: process 4711 of the guest runs as user 107"},
		"another user that has it": {status(107), true, "ok: its nodes are there, for root alone"},
		"of whom nothing is told":  {"", false, "unknown: whether process 4711 of the guest may open its nodes"},
	} {
		k := hosttest.NewLab(t, nil)
		put(t, k, "sys/fs/cgroup/system.slice/web.service/cgroup.procs", "4711\n")
		put(t, k, "proc/4711/status", c.status)
		var nodes []string
		if c.opened {
			nodes = []string{"/dev/vfio/18"}
		}
		k.Process(4711, "qemu-system-x86_64", nodes...)
		mustOnKernel(t, k, "assign", "web", "--from", vf, "--unit", "web.service")
		if got := guestLines(t, k, "why", "guest=web")["nodes "+vf]; !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// A captured host does not show its nodes, which is not that they are not there.
func TestWhyGuestCapturedNodes(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	mustOnKernel(t, k, "assign", "web", "--from", "0000:02:10.0")
	file := filepath.Join(t.TempDir(), "host.tar.gz")
	mustOnKernel(t, k, "snapshot", file)
	stdout, _ := on(t, file, "why guest=web")
	if strings.Contains(stdout, "not there") || !strings.Contains(stdout, "its owner was not captured") {
		t.Error(stdout)
	}
}

// A VF that went with its PF's other VFs comes back by these, and no line says otherwise.
func TestWhyGuestLostVF(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	const vf = "0000:02:10.0"
	mustOnKernel(t, k, "assign", "web", "--from", vf)
	if err := k.Write("sys/bus/pci/devices/0000:02:00.0/sriov_numvfs", "0"); err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(mustOnKernel(t, k, "why", "guest=web").stdout), " ")
	const hint = "cure: viaduct apply, or viaduct vf create 0000:02:00.0 1"
	if strings.Count(text, hint) != 2 || strings.Contains(text, "pci/rescan") ||
		!strings.Contains(text, "sriov_numvfs: 0") {
		t.Error(text)
	}
}

// What the kernel said before the lease was made is no trouble of the guest's, and each line has its time.
func TestWhyGuestKernelLines(t *testing.T) {
	const vf, early, later = "0000:02:10.0", "5,1,1,-;", "4,2,4000000000000000,-;"
	for name, c := range map[string]struct{ log, want, see string }{
		"old trouble":   {early + "pci " + vf + ": BAR 6: failed to assign\n", "ok: ", "failed to assign"},
		"trouble":       {later + "vfio-pci " + vf + ": timed out\n", "no: ", "timed out"},
		"no trouble":    {later + "vfio-pci " + vf + ": enabling device\n", "ok: ", "enabling device"},
		"of another":    {later + "vfio-pci 0000:02:10.2: timed out\n", "ok: ", "nothing of it"},
		"without times": {"4,2,x,-;vfio-pci " + vf + ": timed out\n", "unknown: ", "timed out"},
	} {
		k := hosttest.NewLab(t, nil)
		mustOnKernel(t, k, "assign", "web", "--from", vf)
		put(t, k, "dev/kmsg", c.log)
		if got := guestLines(t, k, "why", "guest=web")["kernel "+vf]; !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		text := mustOnKernel(t, k, "why", "guest=web").stdout
		if !strings.Contains(strings.Join(strings.Fields(text), " "), c.see) {
			t.Errorf("%s: it does not show %q:\n%s", name, c.see, text)
		}
		if dated := regexp.MustCompile(`/dev/kmsg: \d{4}-\d\d-\d\d\s+\d\d:\d\d:\d\d\s+[-+]\d{4}:`); name != "of another" &&
			name != "without times" && !dated.MatchString(text) {
			t.Errorf("%s: the line has no time:\n%s", name, text)
		}
	}
}

// What was last done to a guest's device is told, with when, and by whom.
func TestWhyGuestLastChange(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	const vf = "0000:02:10.0"
	mustOnKernel(t, k, "assign", "web", "--from", vf)
	got := guestLines(t, k, "why", "guest=web")["last_change"]
	form := regexp.MustCompile(`the lease was made [-\d]{10} [:\d]{8} [-+]\d{4}; viaduct last did this, for \S+, at ` +
		`[-\d]{10} [:\d]{8} [-+]\d{4}: ` + vf + `: driver .* -> vfio-pci \(viaduct assign web --from ` + vf + `\)`)
	if !form.MatchString(got) {
		t.Error(got)
	}
}
