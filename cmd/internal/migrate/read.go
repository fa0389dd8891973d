package migrate

import (
	"errors"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/iommu/acpi"
	"viaduct/sriov"
)

const (
	pciDevices = "sys/bus/pci/devices"
	netClass   = "sys/class/net"
)

// Read reads a host's facts, as far as it has them. Name is what the user calls the host.
func Read(m *lease.Manager, declaration *hostfile.Host, name string) (*Facts, error) {
	h, t := m.Host(), m.Topology
	f := &Facts{Host: name, Live: h.Live(), Remapping: t.InterruptRemapping}
	f.Arch, _ = h.String("proc/sys/kernel/arch")
	f.Kernel, _ = h.String("proc/sys/kernel/osrelease")
	if text, err := h.Read("proc/cpuinfo"); err == nil {
		f.CPU = readCPU(string(text))
	}
	if text, err := h.Read("proc/meminfo"); err == nil {
		f.Memory = readMemory(string(text))
	}
	f.Nested = readNested(h)
	for _, u := range t.Units {
		f.Units = append(f.Units, readUnit(h, u))
	}

	var err1, err2 error
	f.Bridges, err1 = iommu.Bridges(h)
	f.VLANs, err2 = iommu.VLANInterfaces(h)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	leases, err := m.Book.Recorded()
	if err != nil {
		return nil, err
	}
	for _, l := range leases {
		f.Guests = append(f.Guests, l.Guest)
		for _, d := range l.Devices {
			f.uses(d.Wanted[sriov.MAC], "guest "+l.Guest+" has it")
		}
	}
	if err := f.readPorts(m, declaration, leases); err != nil {
		return nil, err
	}
	f.readInterfaces(h)
	return f, nil
}

// uses notes that something has a MAC address.
func (f *Facts) uses(mac, what string) {
	if strings.Trim(mac, "0:") != "" && mac != sriov.StableMAC {
		f.Used = append(f.Used, Used{strings.ToLower(mac), what})
	}
}

// readCPU reads the first CPU of /proc/cpuinfo (arch/x86/kernel/cpu/proc.c); nil if it says no vendor, as ARM's.
func readCPU(text string) *CPU {
	first, _, _ := strings.Cut(text, "\n\n")
	c := &CPU{}
	for line := range strings.Lines(first) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "vendor_id":
			c.Vendor = value
		case "cpu family":
			c.Family, _ = strconv.Atoi(value)
		case "model":
			c.Model, _ = strconv.Atoi(value)
		case "model name":
			c.Name = value
		case "flags":
			c.Flags = strings.Fields(value)
		case "vmx flags":
			c.VMXFlags = strings.Fields(value)
		}
	}
	if c.Vendor == "" {
		return nil
	}
	return c
}

// readMemory reads /proc/meminfo, whose kB are KiB.
func readMemory(text string) *Memory {
	value := func(key string) uint64 {
		for line := range strings.Lines(text) {
			if rest, ok := strings.CutPrefix(line, key+":"); ok {
				n, _ := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 53)
				return n << 10
			}
		}
		return 0
	}
	m := &Memory{Total: value("MemTotal"), Available: value("MemAvailable")}
	if m.Total == 0 {
		return nil
	}
	return m
}

// readNested reads whether KVM lets guests be hosts: kvm_intel says Y or N, kvm_amd a number. Nil without KVM.
func readNested(h *iommu.Host) *bool {
	for _, module := range []string{"kvm_amd", "kvm_intel"} {
		if s, err := h.String(path.Join("sys/module", module, "parameters/nested")); err == nil {
			on := s == "Y" || s == "1"
			return &on
		}
	}
	return nil
}

// readUnit reads how wide the addresses are that an IOMMU can map.
func readUnit(h *iommu.Host, u iommu.Unit) Unit {
	out := Unit{Name: u.Name, Kind: u.Kind}
	dir := path.Join("sys/class/iommu", u.Name)
	switch u.Kind {
	case iommu.KindVTd:
		if s, err := h.String(path.Join(dir, "intel-iommu/cap")); err == nil {
			out.Bits = bitsOfVTd(s)
		}
	case iommu.KindAMDVi:
		if s, err := h.String(path.Join(dir, "amd-iommu/features")); err == nil {
			out.Bits = bitsOfAMD(s)
		}
	}
	return out
}

// bitsOfVTd is of VT-d's capability register, in hexadecimal.
func bitsOfVTd(register string) int {
	n, err := strconv.ParseUint(strings.TrimPrefix(register, "0x"), 16, 64)
	if err != nil || n == 0 {
		return 0
	}
	return acpi.VTdCap(n).GuestBits()
}

// bitsOfAMD is of AMD's extended features; the file has the second register after a colon. Without the first nothing is
// told. Each level of its page tables has 9 bits, and pages have 12.
func bitsOfAMD(features string) int {
	first, _, _ := strings.Cut(features, ":")
	n, err := strconv.ParseUint(first, 16, 64)
	if err != nil || n == 0 || acpi.EFR(n).HostLevels() == 0 {
		return 0
	}
	return min(12+9*acpi.EFR(n).HostLevels(), 64)
}

// readPorts reads the PFs that have VFs, and which VFs nobody has.
func (f *Facts) readPorts(m *lease.Manager, declaration *hostfile.Host, leases []*lease.Lease) error {
	h, t := m.Host(), m.Topology
	pools := map[iommu.Address]string{}
	for _, name := range declared.Pools(declaration) {
		vfs, err := m.Declared().Pool(declaration, name)
		if err != nil {
			// None of it is there.
			continue
		}
		for _, vf := range vfs {
			pools[vf.Address] = name
		}
	}
	quarantine, err := m.Book.Quarantined()
	if err != nil {
		return err
	}

	var failed error
	t.All(func(pf *iommu.Device) bool {
		if pf.SRIOV == nil || len(pf.SRIOV.VFs) == 0 {
			return true
		}
		p := readPort(h, pf)
		settings, err := sriov.ReadPort(h, pf)
		if err != nil && h.Live() {
			failed = err
			return false
		}
		for _, vf := range t.VFs(pf) {
			v := VF{Index: vf.VFIndex, Address: vf.Name, ID: vf.ID, Driver: vf.Driver, Pool: pools[vf.Address],
				Free: true}
			v.Unit, _ = h.LinkBase(path.Join(pciDevices, vf.Name, "iommu"))
			if vf.Group != nil {
				v.Regions, _ = iommu.ReservedRegions(h, *vf.Group)
			}
			v.Why = whyNotFree(m, vf, leases, quarantine)
			v.Free = v.Why == ""
			now, _ := settings.Of(vf.VFIndex)
			f.uses(now.Settings[sriov.MAC], "VF "+vf.Name+" has it")
			p.VFs = append(p.VFs, v)
		}
		f.Ports = append(f.Ports, p)
		return true
	})
	return failed
}

// whyNotFree says why a VF cannot be given to a guest; "" if it can. A VF on a driver of the host is taken only from a
// pool, or by its own name.
func whyNotFree(m *lease.Manager, vf *iommu.Device, leases []*lease.Lease, quarantine lease.Quarantined) string {
	i := slices.IndexFunc(leases, func(l *lease.Lease) bool { return l.Has(vf.Address) })
	switch {
	case i >= 0:
		return "guest " + leases[i].Guest + " has it"
	case quarantine.Why(m.Host(), vf) != "":
		return "it is in quarantine"
	case m.Topology.KeptWith(vf) != nil:
		return "the host keeps something else of its IOMMU group"
	case vf.Blocks():
		return "it is on driver " + vf.Driver + " of the host"
	case vf.Group == nil && !m.Topology.LateGroups():
		return "it is in no IOMMU group"
	}
	return ""
}

func readPort(h *iommu.Host, pf *iommu.Device) Port {
	p := Port{Address: pf.Name, ID: pf.ID, Driver: pf.Driver}
	if len(pf.Netdevs) == 0 {
		return p
	}
	p.Netdev = pf.Netdevs[0]
	at := path.Join(netClass, p.Netdev)
	p.Master, _ = h.LinkBase(path.Join(at, "master"))
	p.MTU, _ = h.Int(path.Join(at, "mtu"))
	if n, err := h.Int(path.Join(at, "carrier")); err == nil {
		on := n == 1
		p.Carrier = &on
	}
	if n, err := h.Int(path.Join(at, "speed")); err == nil && n > 0 {
		p.Speed = n
	}
	p.Firmware, _ = iommu.FirmwareVersion(h, p.Netdev)
	return p
}

// readInterfaces notes the addresses of the host's own interfaces.
func (f *Facts) readInterfaces(h *iommu.Host) {
	names, _ := h.Names(netClass)
	for _, n := range names {
		mac, err := h.String(path.Join(netClass, n, "address"))
		if err == nil && len(mac) == len("00:00:00:00:00:00") {
			f.uses(mac, "interface "+n+" has it")
		}
	}
}

// ReadGuest reads what is known of a guest on its host, without asking its VMM.
func ReadGuest(m *lease.Manager, name string) (*Guest, error) {
	all, err := m.Book.Recorded()
	if err != nil {
		return nil, err
	}

	none := &lease.NoLeaseError{Guest: name}
	for _, l := range all {
		if l.Guest != name {
			none.Have = append(none.Have, l.Guest)
			continue
		}
		g := &Guest{Name: name, VM: l.VM}
		if len(l.Sources) > 0 {
			g.From = l.Sources[0].From
		}
		for _, of := range l.Devices {
			d := GuestDevice{Address: of.Address.String(), ID: of.ID, Settings: of.Now}
			if d.Settings == nil {
				d.Settings = of.Wanted
			}
			if found, err := m.Topology.Find(of.Address); err == nil {
				d.Driver = found.Driver
				if found.PhysFn != nil {
					d.PF = found.PhysFn.String()
				}
			} else if !errors.Is(err, iommu.ErrNotFound) && !host.Absent(err) {
				return nil, err
			}
			g.Devices = append(g.Devices, d)
		}
		return g, nil
	}

	return nil, none
}
