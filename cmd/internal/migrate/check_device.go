package migrate

import (
	"fmt"
	"slices"
	"strings"

	"viaduct/cmd/internal/guest"
	"viaduct/iommu"
	"viaduct/vfio"
)

func checkWay(m *move) Line {
	if len(m.guest.Devices) == 0 {
		return refuse(inLease, "the guest has no devices")
	}
	var others []string
	for i, d := range m.guest.Devices {
		moves := d.Migratable != nil && *d.Migratable
		switch {
		case m.by == ByReplug && i == 0 && d.PF != "", m.by == ByFailover && i == 0 && d.PF != "", m.by == ByVFIO &&
			moves:
		default:
			others = append(others, d.Address)
		}
	}
	if len(others) > 0 {
		return refuse(inLease, "there is no way for %s: a failover pair takes one VF, vfio takes devices whose state "+
			"can be read, replug takes one VF", strings.Join(others, ", "))
	}
	if m.by == ByReplug && m.guest.State != nil && !m.guest.State.Pluggable {
		return refuse(inQMP, "the guest's device is not where viaduct can unplug it (assign or run it with --movable)")
	}
	if m.by == ByReplug {
		return warn(inLease, "the guest is without its device from before it moves until after (a failover pair, "+
			"assign --failover BRIDGE, keeps its connections)")
	}
	return ok(inLease, "every device has a way: %s", m.by)
}

func checkPair(m *move) Line {
	if m.by != ByFailover {
		return Line{}
	}
	asked := m.guest.State
	switch {
	case m.guest.VM == nil || m.guest.VM.Standby == "":
		return refuse(inLease, "the guest has no virtio NIC that stands in for its VF (assign --failover BRIDGE)")
	case asked == nil:
		return unknown(inQMP, "whether the guest has taken its pair is not known: its QEMU was not asked")
	case m.guest.VM.Libvirt() && asked.Pluggable:
		return unknown("virsh dumpxml", "the domain has its VF; libvirt does not report whether the guest has taken it")
	case asked.Primary == nil:
		return refuse(inQMP, "the guest's QEMU has no pair of viaduct's (-device "+
			"virtio-net-pci,id=viaduct-standby,...)")
	case !*asked.Primary:
		return refuse(inQMP, "the guest has not taken its VF: wait until its kernel has, or, if it has no failover "+
			"driver, move it with --by replug")
	}
	return ok(inQMP, "the guest has its VF, and the virtio NIC to stand in")
}

func checkState(m *move) Line {
	if m.by != ByVFIO {
		return Line{}
	}
	for _, d := range m.guest.Devices {
		switch {
		case d.Migratable == nil:
			return unknown(inQMP, "whether the state of %s can be read is not known: its QEMU was not asked", d.Address)
		case !*d.Migratable:
			return refuse(inQMP, "%s has no state that can be read: driver %s has no migration protocol for it",
				d.Address, d.Driver)
		}
	}
	return ok(inQMP, "the state of every device can be read")
}

func checkIDs(m *move) Line {
	c := m.drawn()
	if c == nil || len(m.guest.Devices) == 0 {
		return Line{}
	}
	a, b := m.guest.Devices[0].ID, c.vf.ID
	if from, to := m.guest.Devices[0].Kind, c.vf.Kind; from != to {
		return refuse("mdev_type", "the guest has a device of type %s, and %s of %s is of type %s: the state of one "+
			"is not the other's", from, c.vf.Address, m.to.Host, to)
	}
	name := func(id iommu.ID) string { return fmt.Sprintf("%04x:%04x", id.Vendor, id.Device) }
	switch {
	case a == b:
		return ok(inPCI, "both are %s", name(a))
	case m.by == ByVFIO:
		return refuse(inPCI, "the guest has %s, and %s of %s is %s: the state of one is not the other's", name(a),
			c.vf.Address, m.to.Host, name(b))
	case a.Vendor != b.Vendor || a.Device != b.Device:
		return warn(inPCI, "the guest has %s, and gets %s: its kernel must have the driver of that", name(a), name(b))
	}
	return ok(inPCI, "both are %s, of different cards", name(a))
}

func checkDriver(m *move) Line {
	c := m.drawn()
	if m.by != ByVFIO || c == nil {
		return Line{}
	}
	a, b := m.guest.Devices[0].Driver, c.vf.Driver
	if a != b && b != "" {
		return refuse(inPCI, "the guest's device is on %s, and %s of %s is on %s: only the same driver reads its "+
			"state", a,
			c.vf.Address, m.to.Host, b)
	}
	return ok(inPCI, "the guest's device is on %s", a)
}

func checkFirmware(m *move) Line {
	c, s := m.drawn(), m.source()
	if m.by != ByVFIO || c == nil || s == nil || c.pf.Netdev == "" {
		return Line{}
	}
	const where = "the cards' drivers (ethtool)"
	a, b := s.Firmware, c.pf.Firmware
	switch {
	case a == "" || b == "":
		return unknown(where, "the cards' firmware is not known: a device's state is read only by the same")
	case a != b:
		return refuse(where, "%s has firmware %s, and %s has %s: a device's state is read only by the same",
			m.from.Host, a,
			m.to.Host, b)
	}
	return ok(where, "both cards have firmware %s", a)
}

// layout is where the guest has its memory. QEMU keeps it off the range that AMD's IOMMUs reserve if the guest's CPU is
// AMD's (hw/i386/pc.c), wherever it runs.
func (m *move) layout() []vfio.Range {
	if m.guest.VM == nil || m.guest.VM.Memory == 0 {
		return nil
	}
	arch := "amd64"
	if m.to.Arch == "aarch64" {
		arch = "arm64"
	}
	moves := false
	if m.from.CPU != nil && arch == "amd64" {
		moves = m.vendor(m.from.CPU) == "AuthenticAMD"
	}
	return guest.Layout(arch, m.guest.VM.Memory, moves)
}

const inRegions = "sys/kernel/iommu_groups/*/reserved_regions"

func checkHoles(m *move) Line {
	c, layout := m.drawn(), m.layout()
	switch {
	case c == nil:
		return Line{}
	case layout == nil:
		return unknown(inLease, "how much memory the guest has is not known (assign --memory, or run)")
	}
	for _, r := range c.vf.Regions {
		if r.Type != "direct" && r.Type != "reserved" {
			continue
		}
		for _, s := range layout {
			if s.Overlaps(vfio.Range{First: r.Start, Last: r.End}) {
				return refuse(inRegions, "the guest's memory lies where the IOMMU of %s cannot map any, %#x-%#x: "+
					"guests of "+
					"more than 1010 GiB need QEMU's CPU of AMD's, which puts memory elsewhere, from their first boot",
					m.to.Host, r.Start, r.End)
			}
		}
	}
	if len(c.vf.Regions) == 0 {
		return unknown(inRegions, "where the IOMMU of %s can map no memory is not known", m.to.Host)
	}
	return ok(inRegions, "the IOMMU of %s reserves nothing of where the guest's memory is", m.to.Host)
}

func checkWidth(m *move) Line {
	c, layout := m.drawn(), m.layout()
	if c == nil || layout == nil {
		return Line{}
	}
	i := slices.IndexFunc(m.to.Units, func(u Unit) bool { return u.Name == c.vf.Unit })
	if i < 0 && len(m.to.Units) == 1 {
		i = 0
	}
	const where = "sys/class/iommu"
	if i < 0 || m.to.Units[i].Bits <= 0 {
		return unknown(where, "how wide addresses the IOMMU of %s can map is not known", m.to.Host)
	}
	top := layout[len(layout)-1].Last
	if bits := m.to.Units[i].Bits; bits < 64 && top>>bits != 0 {
		return refuse(where, "%s of %s maps addresses of %d bits, and the guest's memory goes up to %#x",
			m.to.Units[i].Name,
			m.to.Host, bits, top)
	}
	return ok(where, "%s of %s maps addresses of %d bits", m.to.Units[i].Name, m.to.Host, m.to.Units[i].Bits)
}

func checkInterrupts(m *move) Line {
	const where = "sys/kernel/irq"
	switch on := m.to.Remapping; {
	case len(m.to.Units) == 0:
		return refuse("sys/class/iommu", "%s has no IOMMU that is in use", m.to.Host)
	case on == nil:
		return unknown(where, "whether %s remaps interrupts is not known", m.to.Host)
	case !*on:
		return refuse(where, "%s does not remap interrupts: VFIO gives out no device there", m.to.Host)
	}
	return ok(where, "%s remaps interrupts", m.to.Host)
}

func checkMemory(m *move) Line {
	const where = "proc/meminfo"
	switch {
	case m.to.Memory == nil:
		return unknown(where, "how much memory %s has is not known", m.to.Host)
	case m.guest.VM == nil || m.guest.VM.Memory == 0:
		return unknown(inLease, "how much memory the guest has is not known (assign --memory, or run)")
	case m.guest.VM.Memory > m.to.Memory.Available:
		return refuse(where, "the guest has %d MiB, which VFIO locks, and %s has %d MiB available",
			m.guest.VM.Memory>>20, m.to.Host, m.to.Memory.Available>>20)
	}
	return ok(where, "%s has %d MiB available for the guest's %d", m.to.Host, m.to.Memory.Available>>20,
		m.guest.VM.Memory>>20)
}
