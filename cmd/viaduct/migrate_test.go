package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/migrate"
	"viaduct/cmd/internal/vmm"
	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// What hosts of the pairs are made of.
const (
	intel = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 106\n" +
		"model name\t: Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz\nflags\t\t: " + level3 + " pku avx512f vmx\n" +
		"vmx flags\t: vnmi ept vpid tsc_scaling\n"
	olderIntel = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 45\n" +
		"model name\t: Intel(R) Xeon(R) CPU E5-2670 0 @ 2.60GHz\nflags\t\t: " + level2 +
		" avx vmx\nvmx flags\t: vnmi ept\n"
	amd = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\n" +
		"model name\t: AMD EPYC 7763 64-Core Processor\nflags\t\t: " + level3 + " pku sse4a svm tsc_scale\n"
	level2 = "fpu sse sse2 pni ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm rdtscp aes"
	level3 = level2 + " avx avx2 bmi1 bmi2 f16c fma abm movbe xsave invpcid pcid"

	dmar = "sys/devices/virtual/iommu/dmar0/intel-iommu/cap"
	// Of a server of Intel's: 48 bits, in four levels; and of a desktop's: 39.
	wide   = "8d2078c106f0466\n"
	narrow = "1c0000c40660462\n"

	br0  = "sys/devices/virtual/net/br0/"
	port = "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/net/enp1s0/"
	vm   = `"memory": 8589934592, "standby": "br0", "machine": "pc-q35-9.1", "words": true, "format": "qemu", "socket": "/run/viaduct/qmp-web"`
)

// pairHost is a host with a NIC that has two VFs in pool net, in a bridge that guests' virtual NICs are on.
func pairHost() hosttest.Tree {
	up := "-> ../../../../../../"
	vf := func(n int) hosttest.PCI {
		return hosttest.PCI{
			At: fmt.Sprintf("0000:00:01.0/0000:01:10.%d", 2*n), ID: "8086:10ca", Class: "020000", Driver: "vfio-pci",
			Group: 20 + n,
			Files: hosttest.Tree{"physfn": "-> ../0000:01:00.0", "iommu": "-> ../../../virtual/iommu/dmar0",
				"vfio-dev/vfio" + fmt.Sprint(n) + "/dev": fmt.Sprintf("511:%d\n", n)},
		}
	}

	return hosttest.Made(
		hosttest.PCI{At: "0000:00:01.0", ID: "8086:1901", Class: "060400", Driver: "pcieport", Group: 1},
		hosttest.PCI{At: "0000:00:01.0/0000:01:00.0", ID: "8086:10c9", Class: "020000", Driver: "igb", Group: 2,
			Files: hosttest.Tree{
				"sriov_totalvfs": "7\n", "sriov_offset": "128\n", "sriov_stride": "2\n", "sriov_vf_device": "10ca\n",
				"sriov_numvfs": "2\n",
				"virtfn0":      "-> ../0000:01:10.0", "virtfn1": "-> ../0000:01:10.2",
				"net/enp1s0/address": "52:54:00:00:01:00\n", "net/enp1s0/mtu": "1500\n", "net/enp1s0/flags": "0x1003\n",
				"net/enp1s0/carrier": "1\n", "net/enp1s0/speed": "1000\n", "net/enp1s0/subsystem": up + "class/net",
				"net/enp1s0/addr_assign_type": "0\n", "net/enp1s0/master": up + "virtual/net/br0",
			}},
		vf(0), vf(1),
	).With(hosttest.Tree{
		"sys/class/iommu/ivhd0": hosttest.Gone,
		"sys/devices/pci0000:00/0000:00:00.2/iommu/ivhd0/amd-iommu/features": hosttest.Gone,
		"sys/class/iommu/dmar0": "-> ../../devices/virtual/iommu/dmar0", dmar: wide,
		"sys/class/net/enp1s0": "-> ../../devices/pci0000:00/0000:00:01.0/0000:01:00.0/net/enp1s0",
		"sys/class/net/br0":    "-> ../../devices/virtual/net/br0",
		br0 + "address":        "52:54:00:00:01:00\n", br0 + "mtu": "1500\n", br0 + "flags": "0x1003\n",
		br0 + "operstate":             "up\n",
		br0 + "bridge/vlan_filtering": "0\n", br0 + "bridge/default_pvid": "1\n",
		br0 + "brif/enp1s0":          "-> ../../../../pci0000:00/0000:00:01.0/0000:01:00.0/net/enp1s0/brport",
		"sys/kernel/irq/9/chip_name": "IR-IO-APIC\n",
		"proc/sys/kernel/arch":       "x86_64\n", "proc/sys/kernel/osrelease": "6.12.0\n", "proc/cpuinfo": intel,
		"proc/meminfo":                           "MemTotal:       67108864 kB\nMemAvailable:   60000000 kB\n",
		"sys/module/kvm_intel/parameters/nested": "Y\n",
		"viaduct/firmware-versions":              "enp1s0 3.25\n",
		"etc/viaduct/host.yaml":                  "pfs:\n  - select: path=0000:00:01.0/00.0\n    count: 2\n    vfs:\n      - pool: net\n        driver: vfio\n",
	})
}

// web is the host with a guest that has its first VF.
func web(cpu, settings, machine string) hosttest.Tree {
	return hosttest.Tree{"run/viaduct/lease-web.json": fmt.Sprintf(`{"guest": "web", "from": "net", "count": 1, "ready": true, "devices":
		[{"address": "0000:01:10.0", "id": {"vendor": 32902, "device": 4298, "subvendor": 6900, "subdevice": 4352, "class": 131072},
		"pf": {"path": "0000:00:01.0/00.0"}, "vf_index": 0, "now": {%s}}], "vm": {"cpu": %q, %s}}`, settings, cpu, machine) + "\n"}
}

const mac = `"mac": "52:54:00:aa:00:01"`

// pair is a guest's two hosts, as they differ from two that are alike, and the lines that say so, as "RESULT text".
type pair struct {
	cpu, settings, vm string // of the guest
	from, to          hosttest.Tree
	args              string
	lines             map[string]string
}

// usual are the lines of two hosts that are alike; what is not named is ok.
var usual = map[string]string{
	"machine":      "unknown the machine types of QEMU on b.snapshot are not known",
	"qemu-version": "unknown", "qemu-start": "unknown", "running": "unknown", "blocked": "unknown", "disks": "unknown",
	"pair":    "unknown",
	"address": "unknown no interface and no guest of b.snapshot has 52:54:00:aa:00:01", "same-network": "unknown",
}

var pairs = map[string]pair{
	"alike": {},
	"a guest with the host's CPU": {cpu: "host", lines: map[string]string{
		"cpu-model": "warn both are Intel(R) Xeon(R) Gold 6338", "nested": "warn the guest can be a host itself"}},
	"Intel to AMD, the host's CPU": {cpu: "host", to: hosttest.Tree{"proc/cpuinfo": amd}, lines: map[string]string{
		"cpu-vendor": "refuse -cpu Haswell-noTSX,vendor=GenuineIntel", "cpu-model": "refuse",
		"cpu-flags":       "refuse avx512f",
		"cpu-mitigations": "warn", "nested": "refuse VMX and SVM"}},
	"Intel to AMD, a model without a maker": {to: hosttest.Tree{"proc/cpuinfo": amd}, lines: map[string]string{
		"cpu-vendor": "refuse KVM shows the guest the host's maker", "cpu-flags": "unknown b.snapshot lacks avx512f",
		"cpu-mitigations": "warn the other maker's"}},
	"AMD to Intel, a model with its maker": {cpu: "Nehalem,vendor=AuthenticAMD",
		from: hosttest.Tree{"proc/cpuinfo": amd},
		lines: map[string]string{"cpu-vendor": "warn the guest sees AuthenticAMD on both", "cpu-flags": "unknown sse4a",
			"cpu-mitigations": "warn Meltdown"}},
	"an older CPU, a model with more flags": {cpu: "SandyBridge,+avx2", to: hosttest.Tree{"proc/cpuinfo": olderIntel},
		lines: map[string]string{
			"cpu-flags": "refuse b.snapshot lacks avx2, which the guest has: choose -cpu Nehalem when",
			"tsc":       "warn cannot scale the TSC"}},
	"an older CPU, the host's": {cpu: "host", to: hosttest.Tree{"proc/cpuinfo": olderIntel}, lines: map[string]string{
		"cpu-model": "refuse E5-2670", "cpu-flags": "refuse bmi1", "tsc": "warn", "nested": "warn"}},
	"an invariant TSC without a frequency": {cpu: "EPYC,invtsc=on",
		lines: map[string]string{"tsc": "refuse without tsc-frequency="}},
	"an invariant TSC that is not scaled": {cpu: "Nehalem,+invtsc,tsc-frequency=2000000000",
		to:    hosttest.Tree{"proc/cpuinfo": olderIntel},
		lines: map[string]string{"tsc": "refuse was promised an invariant one", "cpu-flags": "unknown"}},
	"a guest that is a host, and may not be": {cpu: "Nehalem,vmx=on",
		to:    hosttest.Tree{"sys/module/kvm_intel/parameters/nested": "N\n"},
		lines: map[string]string{"nested": "refuse nested=1"}},
	"protection keys that leak": {from: hosttest.Tree{"proc/sys/kernel/osrelease": "5.15.0-91-generic\n"},
		lines: map[string]string{
			"pkru": "warn may spin"}},
	"an older kernel there": {to: hosttest.Tree{"proc/sys/kernel/osrelease": "5.14.0-427.el9\n"},
		lines: map[string]string{
			"kernel": "warn has an older kernel, 5.14.0-427.el9", "virtio": "refuse UDP segmentation"}},
	"another architecture": {to: hosttest.Tree{"proc/sys/kernel/arch": "aarch64\n"},
		lines: map[string]string{"arch": "refuse"}},
	"a machine type of each version": {vm: strings.Replace(vm, "pc-q35-9.1", "q35", 1), lines: map[string]string{
		"machine": "unknown another one in each version"}},
	"memory where AMD's IOMMU has none": {vm: strings.Replace(vm, "8589934592", "1099511627776", 1),
		to: hosttest.Tree{"sys/kernel/iommu_groups/20/reserved_regions": "0x000000fd00000000 0x000000ffffffffff reserved\n",
			"sys/kernel/iommu_groups/21/reserved_regions": "0x000000fd00000000 0x000000ffffffffff reserved\n",
			"proc/meminfo": "MemTotal: 2147483648 kB\nMemAvailable: 2000000000 kB\n"},
		lines: map[string]string{"iommu-holes": "refuse 0xfd00000000-0xffffffffff"}},
	"an IOMMU of narrow addresses": {vm: strings.Replace(vm, "8589934592", "687194767360", 1),
		to: hosttest.Tree{dmar: narrow,
			"proc/meminfo": "MemTotal: 2147483648 kB\nMemAvailable: 2000000000 kB\n"},
		lines: map[string]string{"iommu-width": "refuse dmar0 of b.snapshot maps addresses of 39 bits"}},
	"too little memory": {to: hosttest.Tree{"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n"},
		lines: map[string]string{
			"memory": "refuse b.snapshot has 4096 MiB available"}},
	"a VLAN that the bridge does not lead to": {settings: mac + `, "vlan": "100"`, lines: map[string]string{
		"vlan": "refuse enp1s0.100"}},
	"a VLAN that a port of the bridge is": {settings: mac + `, "vlan": "100"`, to: hosttest.Tree{
		br0 + "brif/enp1s0": hosttest.Gone, br0 + "brif/enp1s0.100": "-> ../../enp1s0.100/brport",
		"proc/net/vlan/config": "VLAN Dev name    | VLAN ID\nName-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\nenp1s0.100 | 100  | enp1s0\n"}},
	"a VLAN that the bridge filters": {settings: mac + `, "vlan": "100"`, to: hosttest.Tree{
		br0 + "bridge/vlan_filtering": "1\n", br0 + "bridge/default_pvid": "100\n",
		"viaduct/bridge-vlans": "enp1s0 100\n"}},
	"a bridge that keeps VLANs apart, untold": {to: hosttest.Tree{br0 + "bridge/vlan_filtering": "1\n"},
		lines: map[string]string{
			"vlan": "unknown"}},
	"a smaller MTU": {from: hosttest.Tree{port + "mtu": "9000\n", br0 + "mtu": "9000\n"}, lines: map[string]string{
		"mtu": "refuse MTU 1500", "bridge": "refuse MTU 1500"}},
	"no free VF": {to: hosttest.Tree{
		"run/viaduct/lease-db.json":   `{"guest": "db", "devices": [{"address": "0000:01:10.0"}]}` + "\n",
		"run/viaduct/lease-mail.json": `{"guest": "mail", "devices": [{"address": "0000:01:10.2"}]}` + "\n"},
		lines: map[string]string{"free-vf": "refuse guest db has it"}},
	"no such pool": {args: "--from fast", lines: map[string]string{"free-vf": `refuse no pool, PF or VF "fast"`,
		"link": "", "mtu": "", "speed": "", "settings": "", "device-ids": "", "vlan": "", "iommu-holes": "",
		"iommu-width": ""}},
	"the guest's address is taken": {to: hosttest.Tree{br0 + "address": "52:54:00:AA:00:01\n"},
		lines: map[string]string{
			"address": "refuse interface br0 has it"}},
	"a guest of the same name": {to: hosttest.Tree{"run/viaduct/lease-web.json": `{"guest": "web", "devices": []}` +
		"\n"}, lines: map[string]string{
		"guest-name": "refuse"}},
	"a bridge that is missing": {to: hosttest.Tree{"sys/class/net/br0": hosttest.Gone}, lines: map[string]string{
		"bridge": "refuse has no bridge br0", "vlan": ""}},
	"no link, and a slower one": {to: hosttest.Tree{port + "carrier": "0\n", port + "speed": "100\n"},
		lines: map[string]string{
			"link": "refuse", "speed": "warn"}},
	"interrupts that are not remapped": {to: hosttest.Tree{"sys/kernel/irq/9/chip_name": "IO-APIC\n"},
		lines: map[string]string{
			"interrupts": "refuse"}},
	"another card": {to: hosttest.Tree{
		"sys/devices/pci0000:00/0000:00:01.0/0000:01:10.0/modalias": "pci:v00008086d0000154Csv00001AF4sd00001100bc02sc00i00\n",
		"sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/driver":   "-> ../../../../bus/pci/drivers/ixgbe"},
		lines: map[string]string{"device-ids": "warn gets 8086:154c", "settings": "warn is on ixgbe instead of igb"}},
	"other firmware, by the device's state": {args: "--by vfio",
		to: hosttest.Tree{"viaduct/firmware-versions": "enp1s0 3.30\n"}, lines: map[string]string{
			"firmware": "refuse 3.30", "device-state": "unknown", "way": "refuse", "device-driver": "ok",
			"virtio": "", "pair": "", "bridge": "", "vlan": "", "same-network": ""}},
	"libvirt's guest": {vm: strings.Replace(vm, `"format": "qemu"`, `"format": "libvirt"`, 1), lines: map[string]string{
		"vmm": "unknown whether it is on b.snapshot"}},
	"Incus's guest": {vm: strings.Replace(vm, `"format": "qemu"`, `"format": "incus"`, 1), lines: map[string]string{
		"vmm": "refuse for incus"}},
	"no socket": {vm: strings.Replace(vm, `, "socket": "/run/viaduct/qmp-web"`, "", 1), lines: map[string]string{
		"vmm": "refuse --movable"}},
	"no virtio NIC": {vm: strings.Replace(vm, `"standby": "br0", `, "", 1), lines: map[string]string{
		"way": "warn the guest is without its device", "virtio": "", "pair": "", "bridge": "", "vlan": ""}},
}

// Each pair of hosts gives the lines of two that are alike, but for those that it names, from folders and snapshots, and
// the exit status says whether one refuses.
func TestMigratePairs(t *testing.T) {
	if len(pairs) < 24 {
		t.Errorf("%d pairs", len(pairs))
	}

	for name, p := range pairs {
		t.Run(name, func(t *testing.T) {
			cpu, settings, machine := cmp.Or(p.cpu, "Nehalem"), cmp.Or(p.settings, mac), cmp.Or(p.vm, vm)
			from := pairHost().With(web(cpu, settings, machine)).With(p.from)
			to := pairHost().With(p.to)
			dir := t.TempDir()
			a, b := filepath.Join(dir, "a.snapshot"), filepath.Join(dir, "b.snapshot")
			for file, tree := range map[string]hosttest.Tree{a: from, b: to} {
				var stderr bytes.Buffer
				if status := run([]string{"viaduct", "--host", tree.Dir(t), "snapshot", file}, &stderr,
					&stderr); status != 0 {
					t.Fatal(stderr.String())
				}
			}
			var stdout, stderr bytes.Buffer
			args := append([]string{"viaduct", "--host", a, "migrate", "web", "--to", b, "--check", "--json"},
				strings.Fields(p.args)...)
			status := run(args, &stdout, &stderr)
			var r migrate.Report
			if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
				t.Fatalf("%v: %s%s", err, stdout.String(), stderr.String())
			}
			comparePair(t, &r, p.lines)
			if want := map[bool]int{true: exitDone, false: exitRefused}[r.Ready]; status != want {
				t.Errorf("exit status %d, want %d: %s", status, want, stderr.String())
			}
		})
	}
}

// comparePair compares a report with what is usual, and what is not: "" stands for a line that must not be there.
func comparePair(t *testing.T, r *migrate.Report, differ map[string]string) {
	t.Helper()
	want := maps.Clone(usual)
	maps.Copy(want, differ)
	seen := map[string]bool{}
	for _, l := range r.Lines {
		seen[l.Check] = true
		expected, named := want[l.Check]
		if !named {
			expected = "ok"
		}
		result, text, _ := strings.Cut(expected, " ")
		if named && expected == "" {
			t.Errorf("%s is told: %+v", l.Check, l)
		} else if string(l.Result) != result || !strings.Contains(l.What, text) || l.Where == "" {
			t.Errorf("%s: %s: %s [%s]\nwant %s", l.Check, l.Result, l.What, l.Where, expected)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if want[name] != "" && !seen[name] {
			t.Errorf("%s is not told", name)
		}
	}
}

// The report for people, and what is wrong usage.
func TestMigrateText(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.snapshot"), filepath.Join(dir, "b.snapshot")
	for file, tree := range map[string]hosttest.Tree{a: pairHost().With(web("host", mac, vm)),
		b: pairHost().With(hosttest.Tree{"proc/cpuinfo": amd})} {
		if status := run([]string{"viaduct", "--host", tree.Dir(t), "snapshot", file}, os.Stderr,
			os.Stderr); status != 0 {
			t.Fatal(file)
		}
	}
	var stdout, stderr bytes.Buffer
	status := run([]string{"viaduct", "--host", a, "migrate", "web", "--to", b, "--check"}, &stdout, &stderr)
	compareGolden(t, filepath.Join("testdata", "migrate-check.golden"),
		fmt.Sprintf("%s== stderr\n%s== exit status %d\n", stdout.String(), stderr.String(), status))

	for line, want := range map[string]int{
		"migrate web --check":                          exitUsage,
		"migrate --to " + b + " --check":               exitUsage,
		"migrate web --to nowhere.snapshot --check":    exitUsage,
		"migrate web --to " + b + " --check --by ship": exitUsage,
		"migrate db --to " + b + " --check":            exitFailed,
	} {
		stderr.Reset()
		if status := run(append([]string{"viaduct", "--host", a}, strings.Fields(line)...), &stdout,
			&stderr); status != want {
			t.Errorf("%s: exit status %d, want %d: %s", line, status, want, stderr.String())
		}
	}
}

// What assign and run keep for a move: the machine, and a socket of viaduct's own, which is printed for QEMU.
func TestMovable(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", "2"}} {
		if err := k.Write("sys/bus/pci/devices/0000:01:00.0/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	h := &iommu.Host{Host: k.Host()}
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	var stdout, stderr bytes.Buffer
	line := "assign web --from 0000:01:00.0 --mac 52:54:00:aa:00:01 --memory 4G --movable --no-reset"
	status := runOn(open, append([]string{"viaduct"}, strings.Fields(line)...), &stdout, &stderr)
	socket := migrate.SocketOf(h, "web")
	if status != 0 || !strings.Contains(stdout.String(), "-qmp unix:"+socket+",server=on,wait=off") ||
		!strings.Contains(stdout.String(), "id=viaduct-primary,bus=viaduct-port1") {
		t.Fatalf("status %d: %s%s", status, stdout.String(), stderr.String())
	}
	l, err := lease.BookOf(h).Get("web")
	if err != nil || l.VM == nil || l.VM.Socket != socket || l.VM.Memory != 4<<30 || l.VM.Words ||
		l.VM.Format != "qemu" {
		t.Errorf("%+v, %v", l.VM, err)
	}

	o := &assignOptions{}
	o.VM = &vmm.Machine{Format: "qemu", Standby: "br0"}
	o.keepWords(strings.Fields("qemu-system-x86_64 -m 2G -cpu EPYC,vendor=AuthenticAMD -machine q35,accel=kvm"))
	want := vmm.Machine{Format: "qemu", Standby: "br0", Memory: 2 << 30, CPU: "EPYC,vendor=AuthenticAMD",
		Machine: "q35", Accel: "kvm", Words: true}
	if *o.VM != want {
		t.Errorf("%+v", *o.VM)
	}

	for line, want := range map[string]int{
		"assign db --from 0000:01:00.0 --movable --format libvirt": exitUsage,
		"migrate web":                               exitUsage,
		"migrate web --to -x":                       exitUsage,
		"migrate web --to host --by ship":           exitUsage,
		"migrate web --resume --cancel":             exitUsage,
		"migrate web --take-back":                   exitUsage,
		"migrate web --to host --force=split-brain": exitUsage,
		"migrate web --to host --bandwidth fast":    exitUsage,
		"migrate web --cancel":                      exitFailed,
		"migrate web --to exec:false":               exitFailed,
	} {
		stderr.Reset()
		if status := runOn(open, append([]string{"viaduct"}, strings.Fields(line)...), &stdout,
			&stderr); status != want {
			t.Errorf("%s: exit status %d, want %d: %s", line, status, want, stderr.String())
		}
	}
}
