package migrate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Result is what a check found.
type Result string

// The results. Only Refuse keeps a guest from moving.
const (
	OK      Result = "ok"
	Warn    Result = "warn"
	Refuse  Result = "refuse"
	Unknown Result = "unknown" // it could not be read
)

// Line is what one check says.
type Line struct {
	Check  string `json:"check"`
	Result Result `json:"result"`
	What   string `json:"what"`
	Where  string `json:"where"` // what was read
}

// Report is whether a guest is ready to move.
type Report struct {
	Guest string `json:"guest"`
	From  string `json:"from"`
	To    string `json:"to"`
	By    Way    `json:"by"`
	Ready bool   `json:"ready"` // nothing refuses
	Lines []Line `json:"checks"`
}

// Way is how a guest's devices move.
type Way string

// The ways.
const (
	ByFailover Way = "failover" // a virtio NIC stands in while the VF is changed for another one
	ByVFIO     Way = "vfio"     // the device's state moves, by VFIO's migration protocol
	ByReplug   Way = "replug"   // the device is unplugged, and another one plugged: the guest is without one meanwhile
)

// Wish is what the user asks for.
type Wish struct {
	Pool string // to draw from there; "" for what the guest's devices were drawn from here
	By   Way    // "" for the best there is
}

// move is what the checks look at.
type move struct {
	guest    *Guest
	from, to *Facts
	pool     string
	by       Way
}

// check is one question.
type check struct {
	name string
	ask  func(m *move) Line
}

// checks are all questions, in the order in which they are told: of the hosts, the virtual machine, the devices, the
// network, and memory. One that does not apply answers with no Result.
var checks = []check{
	{"arch", checkArch},
	{"kernel", checkKernel},
	{"guest-name", checkName},
	{"cpu-vendor", checkVendor},
	{"cpu-model", checkModel},
	{"cpu-flags", checkFlags},
	{"cpu-mitigations", checkMitigations},
	{"tsc", checkTSC},
	{"nested", checkNested},
	{"pkru", checkPKRU},
	{"vmm", checkVMM},
	{"machine", checkMachine},
	{"qemu-version", checkVersion},
	{"qemu-start", checkStart},
	{"virtio", checkVirtio},
	{"running", checkRunning},
	{"blocked", checkBlocked},
	{"disks", checkDisks},
	{"way", checkWay},
	{"pair", checkPair},
	{"device-state", checkState},
	{"device-ids", checkIDs},
	{"device-driver", checkDriver},
	{"firmware", checkFirmware},
	{"free-vf", checkFree},
	{"link", checkLink},
	{"mtu", checkMTU},
	{"speed", checkSpeed},
	{"settings", checkSettings},
	{"bridge", checkBridge},
	{"vlan", checkVLAN},
	{"address", checkAddress},
	{"same-network", checkSameNetwork},
	{"iommu-holes", checkHoles},
	{"iommu-width", checkWidth},
	{"interrupts", checkInterrupts},
	{"memory", checkMemory},
}

// Check answers whether a guest can move from one host to another, line by line. It looks at nothing but what it is
// given.
func Check(g *Guest, from, to *Facts, wish Wish) *Report {
	g.readMoves()
	m := &move{guest: g, from: from, to: to, pool: cmp.Or(wish.Pool, g.From), by: wish.By}
	if m.by == "" {
		m.by = m.best()
	}
	r := &Report{Guest: g.Name, From: from.Host, To: to.Host, By: m.by, Ready: true, Lines: []Line{}}
	for _, c := range checks {
		line := c.ask(m)
		if line.Result == "" {
			continue
		}
		line.Check = c.name
		r.Ready = r.Ready && line.Result != Refuse
		r.Lines = append(r.Lines, line)
	}
	return r
}

// readMoves reads whether the states of the guest's devices can move out of what its QEMU says keeps it from moving: it
// has asked each device (VFIO_DEVICE_FEATURE_MIGRATION), but for the one of a failover pair, of which it says nothing.
func (g *Guest) readMoves() {
	if g.State == nil || g.VM == nil || g.VM.Standby != "" || g.VM.Libvirt() {
		return
	}
	for i := range g.Devices {
		moves := !slices.ContainsFunc(g.State.Blocked, func(why string) bool {
			return strings.Contains(why, g.Devices[i].Address) || strings.Contains(strings.ToLower(why), "vfio")
		})
		g.Devices[i].Migratable = &moves
	}
}

// best is the way that costs the guest least.
func (m *move) best() Way {
	switch {
	case m.guest.VM != nil && m.guest.VM.Standby != "":
		return ByFailover
	case len(m.guest.Devices) > 0 && !slices.ContainsFunc(m.guest.Devices, func(d GuestDevice) bool {
		return d.Migratable == nil || !*d.Migratable
	}):
		return ByVFIO
	}
	return ByReplug
}

func ok(where, format string, a ...any) Line { return Line{"", OK, fmt.Sprintf(format, a...), where} }
func warn(where, format string, a ...any) Line {
	return Line{"", Warn, fmt.Sprintf(format, a...), where}
}
func refuse(where, format string, a ...any) Line {
	return Line{"", Refuse, fmt.Sprintf(format, a...), where}
}
func unknown(where, format string, a ...any) Line {
	return Line{"", Unknown, fmt.Sprintf(format, a...), where}
}

// Where what is checked was read.
const (
	inArch    = "proc/sys/kernel/arch"
	inRelease = "proc/sys/kernel/osrelease"
	inCPUInfo = "proc/cpuinfo"
	inWords   = "the VMM's command line"
	inLease   = "the lease"
	inQMP     = "QEMU's machine protocol"
	inSysNet  = "sys/class/net"
	inPCI     = "sys/bus/pci/devices"
)

func checkArch(m *move) Line {
	a, b := m.from.Arch, m.to.Arch
	switch {
	case a == "" || b == "":
		return unknown(inArch, "the hosts' architectures are not known (the file is there since Linux 6.1)")
	case a != b:
		return refuse(inArch, "%s is %s and %s is %s: no guest can move between them", m.from.Host, a, m.to.Host, b)
	}
	return ok(inArch, "both are %s", a)
}

func checkKernel(m *move) Line {
	a, b := release(m.from.Kernel), release(m.to.Kernel)
	switch {
	case a == nil || b == nil:
		return unknown(inRelease, "the kernels' releases are not known")
	case slices.Compare(b, a) < 0:
		return warn(inRelease, "%s has an older kernel, %s, than %s, %s: KVM's older one may not know all of the "+
			"guest's state", m.to.Host, m.to.Kernel, m.from.Host, m.from.Kernel)
	}
	return ok(inRelease, "Linux %s to %s", m.from.Kernel, m.to.Kernel)
}

// release is the version that a kernel's release begins with, as far as it changes what KVM can; nil if it begins with
// none.
func release(s string) []int {
	var major, minor int
	if n, _ := fmt.Sscanf(s, "%d.%d", &major, &minor); n != 2 {
		return nil
	}
	return []int{major, minor}
}

// atLeast reports whether a kernel is of a version or later; false for one that is not known.
func atLeast(s string, major, minor int) bool {
	r := release(s)
	return r != nil && slices.Compare(r, []int{major, minor}) >= 0
}

func checkName(m *move) Line {
	if slices.Contains(m.to.Guests, m.guest.Name) {
		return refuse(inLease, "%s has a guest %q already (viaduct leases there)", m.to.Host, m.guest.Name)
	}
	return ok(inLease, "%s has no guest of this name", m.to.Host)
}

// checkVMM asks whether viaduct can speak with the guest's VMM.
func checkVMM(m *move) Line {
	vm := m.guest.VM
	switch {
	case vm == nil:
		return unknown(inLease, "what VMM the guest has is not known: its lease was made by an older viaduct")
	case vm.Libvirt() && !m.to.Live:
		return unknown(inLease, "libvirt runs the guest; whether it is on %s is not known", m.to.Host)
	case vm.Libvirt() && m.to.Libvirt == "":
		return refuse(inLease+", virsh", "libvirt runs the guest, and on %s none answers", m.to.Host)
	case vm.Libvirt():
		return ok(inLease+", virsh", "libvirt runs the guest, and on %s it is %s", m.to.Host, m.to.Libvirt)
	case !strings.HasPrefix(vm.Format, "qemu"):
		return refuse(inLease, "the guest's devices were assigned for %s: only guests of QEMU and libvirt can "+
			"move", cmp.Or(vm.Format, "another VMM"))
	case vm.Socket == "":
		return refuse(inLease, "the guest's QEMU has no socket of viaduct's (assign or run it with --failover or "+
			"--movable)")
	}
	return ok(inLease, "the guest's QEMU has a socket of viaduct's")
}

func checkMachine(m *move) Line {
	asked, qemu := m.guest.State, m.to.QEMU
	kind, where := "", inQMP
	if asked != nil {
		kind = asked.Machine
	} else if m.words() {
		kind, where = m.guest.VM.Machine, inWords
	}
	switch {
	case kind == "":
		return unknown(where, "the guest's machine type is not known")
	case asked == nil && (kind == "q35" || kind == "pc" || kind == "virt"):
		return unknown(where, "the guest's machine type is %s, which is another one in each version of QEMU: asking "+
			"its QEMU tells which", kind)
	case qemu == nil:
		return unknown(where, "the machine types of QEMU on %s are not known; the guest's is %s", m.to.Host, kind)
	case !slices.Contains(qemu.Machines, kind):
		return refuse(where, "QEMU %s on %s has no machine type %s", qemu.Version, m.to.Host, kind)
	}
	return ok(where, "QEMU on %s has machine type %s", m.to.Host, kind)
}

func checkVersion(m *move) Line {
	asked, qemu := m.guest.State, m.to.QEMU
	if asked == nil || qemu == nil || release(asked.Version) == nil || release(qemu.Version) == nil {
		return unknown(inQMP, "the versions of QEMU are not known")
	}
	if slices.Compare(release(qemu.Version), release(asked.Version)) < 0 {
		return refuse(inQMP, "%s has QEMU %s, older than the guest's, %s: a guest moves to the same or a newer one",
			m.to.Host, qemu.Version, asked.Version)
	}
	return ok(inQMP, "QEMU %s to %s", asked.Version, qemu.Version)
}

// checkStart is the answer of the destination's own QEMU, started for a moment with the guest's CPU and machine.
func checkStart(m *move) Line {
	switch qemu := m.to.QEMU; {
	case qemu == nil:
		return unknown(inQMP, "QEMU on %s was not tried with the guest's CPU and machine", m.to.Host)
	case qemu.Refused != "":
		return refuse(inQMP, "QEMU on %s does not take the guest's CPU and machine: %s", m.to.Host, qemu.Refused)
	}
	return ok(inQMP, "QEMU on %s takes the guest's CPU and machine", m.to.Host)
}

// checkVirtio compares what the kernels' taps can do, of which QEMU makes features of virtio NICs: UDP segmentation is
// there since Linux 6.2 (drivers/net/tun.c, TUN_F_USO4).
func checkVirtio(m *move) Line {
	if m.by != ByFailover {
		return Line{}
	}
	a, b := m.from.Kernel, m.to.Kernel
	switch {
	case release(a) == nil || release(b) == nil:
		return unknown(inRelease, "what the kernels' taps can do is not known")
	case atLeast(a, 6, 2) && !atLeast(b, 6, 2):
		return refuse(inRelease, "%s has no UDP segmentation in its taps (Linux 6.2), which the guest's virtio NIC "+
			"may use: start the guest with host_uso=off,guest_uso4=off,guest_uso6=off at the NIC", m.to.Host)
	}
	return ok(inRelease, "taps on %s can do what those on %s can", m.to.Host, m.from.Host)
}

func checkRunning(m *move) Line {
	asked := m.guest.State
	switch {
	case asked == nil:
		return unknown(inQMP, "whether the guest runs is not known: its QEMU was not asked")
	case asked.Status != "running":
		return refuse(inQMP, "the guest does not run (it is %s): it could not let go of its device", asked.Status)
	case asked.Migration == "active" || asked.Migration == "setup" || asked.Migration == "cancelling":
		return refuse(inQMP, "another migration of the guest is under way")
	case asked.Jobs > 0:
		return refuse(inQMP, "QEMU is at work on the guest's disks (%d jobs)", asked.Jobs)
	}
	return ok(inQMP, "the guest runs")
}

func checkBlocked(m *move) Line {
	asked := m.guest.State
	if asked == nil {
		return unknown(inQMP, "whether QEMU can move the guest is not known: it was not asked")
	}
	var others []string
	for _, why := range asked.Blocked {
		// The device that goes before is no reason to stay.
		if m.by != ByVFIO && (strings.Contains(why, "VFIO") || strings.Contains(why, "vfio")) {
			continue
		}
		others = append(others, why)
	}
	if len(others) > 0 {
		return refuse(inQMP, "QEMU cannot move the guest: %s", strings.Join(others, "; "))
	}
	return ok(inQMP, "nothing of the guest keeps QEMU from moving it")
}

func checkDisks(m *move) Line {
	asked := m.guest.State
	if asked == nil {
		return unknown(inQMP, "what disks the guest has is not known")
	}
	var missing, unsure []string
	for _, d := range asked.Disks {
		switch {
		case d.There == nil:
			unsure = append(unsure, d.Path)
		case !*d.There:
			missing = append(missing, d.Path)
		}
	}
	switch {
	case len(missing) > 0:
		return refuse(inQMP, "%s has no %s: the guest's disks must be where both hosts reach them", m.to.Host,
			strings.Join(missing, ", "))
	case len(unsure) > 0:
		return unknown(inQMP, "whether %s has %s is not known", m.to.Host, strings.Join(unsure, ", "))
	case len(asked.Disks) == 0:
		return ok(inQMP, "the guest has no disks")
	}
	return warn(inQMP, "%s has files of the names of the guest's disks; that they are the same, and shared, is yours "+
		"to know",
		m.to.Host)
}
