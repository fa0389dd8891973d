package migrate

import (
	"fmt"
	"slices"
	"strings"

	"viaduct/iommu"
	"viaduct/sriov"
)

// source is the PF that a guest's first VF is of.
func (m *move) source() *Port {
	for _, d := range m.guest.Devices {
		if i := slices.IndexFunc(m.from.Ports, func(p Port) bool { return p.Address == d.PF }); i >= 0 && d.PF != "" {
			return &m.from.Ports[i]
		}
	}
	return nil
}

// candidate is a VF that a guest may be given, and its PF.
type candidate struct {
	pf *Port
	vf *VF
}

// candidates are the VFs of the pool, or of the PF that it names, free ones first.
func (m *move) candidates() []candidate {
	var out []candidate
	for i := range m.to.Ports {
		p := &m.to.Ports[i]
		for j := range p.VFs {
			v := &p.VFs[j]
			if v.Pool == m.pool && m.pool != "" || m.pool == p.Netdev || m.pool == p.Address || m.pool == v.Address ||
				m.pool == fmt.Sprintf("%s/vf%d", p.Netdev, v.Index) || "0000:"+m.pool == p.Address {
				out = append(out, candidate{p, v})
			}
		}
	}
	slices.SortStableFunc(out, func(a, b candidate) int {
		switch {
		case a.vf.Free == b.vf.Free:
			return 0
		case a.vf.Free:
			return -1
		}
		return 1
	})
	return out
}

// drawn is the VF that the guest would get; nil if there is none.
func (m *move) drawn() *candidate {
	if all := m.candidates(); len(all) > 0 {
		return &all[0]
	}
	return nil
}

func checkFree(m *move) Line {
	all := m.candidates()
	free := 0
	var why []string
	for _, c := range all {
		if c.vf.Free {
			free++
		} else if len(why) < 3 {
			why = append(why, c.vf.Address+": "+c.vf.Why)
		}
	}
	want := max(len(m.guest.Devices), 1)
	switch {
	case len(all) == 0:
		return refuse(inPCI, "%s has no pool, PF or VF %q (--from names another)", m.to.Host, m.pool)
	case free < want:
		return refuse(inPCI+", "+inLease, "%q of %s has %d free of %d VFs, and %d are wanted (%s)", m.pool,
			m.to.Host, free,
			len(all), want, strings.Join(why, "; "))
	}
	return ok(inPCI+", "+inLease, "%q of %s has %d free of %d VFs", m.pool, m.to.Host, free, len(all))
}

func checkLink(m *move) Line {
	c := m.drawn()
	if c == nil || c.pf.Netdev == "" {
		return Line{}
	}
	switch on := c.pf.Carrier; {
	case on == nil:
		return unknown(inSysNet, "whether %s of %s has a link is not known (it may be down)", c.pf.Netdev, m.to.Host)
	case !*on:
		return refuse(inSysNet, "%s of %s has no link", c.pf.Netdev, m.to.Host)
	}
	return ok(inSysNet, "%s of %s has a link", c.pf.Netdev, m.to.Host)
}

func checkMTU(m *move) Line {
	c, s := m.drawn(), m.source()
	switch {
	case c == nil || c.pf.Netdev == "":
		return Line{}
	case s == nil || s.MTU == 0 || c.pf.MTU == 0:
		return unknown(inSysNet, "the MTUs of both PFs are not known")
	case c.pf.MTU < s.MTU:
		return refuse(inSysNet, "%s of %s has MTU %d, and %s of %s has %d: longer frames would be lost", c.pf.Netdev,
			m.to.Host, c.pf.MTU, s.Netdev, m.from.Host, s.MTU)
	}
	return ok(inSysNet, "MTU %d to %d", s.MTU, c.pf.MTU)
}

func checkSpeed(m *move) Line {
	c, s := m.drawn(), m.source()
	if c == nil || s == nil || c.pf.Speed == 0 || s.Speed == 0 {
		return Line{}
	}
	if c.pf.Speed < s.Speed {
		return warn(inSysNet, "%s of %s is slower, %d Mbit/s, than %s of %s, %d Mbit/s", c.pf.Netdev, m.to.Host,
			c.pf.Speed,
			s.Netdev, m.from.Host, s.Speed)
	}
	return ok(inSysNet, "%d to %d Mbit/s", s.Speed, c.pf.Speed)
}

// checkSettings compares the PFs' drivers, of which each knows its own settings of VFs.
func checkSettings(m *move) Line {
	c, s := m.drawn(), m.source()
	if c == nil || s == nil || len(m.guest.Devices) == 0 {
		return Line{}
	}
	want := m.guest.Devices[0].Settings.Text()
	switch {
	case len(m.guest.Devices[0].Settings) == 0:
		return ok(inLease, "the guest's VF has no settings")
	case c.pf.Driver == s.Driver:
		return ok(inLease+", "+inPCI, "both PFs are on %s, which takes %s", s.Driver, want)
	}
	return warn(inLease+", "+inPCI, "%s of %s is on %s instead of %s, which may not take %s", c.pf.Netdev, m.to.Host,
		c.pf.Driver, s.Driver, want)
}

// bridge is the bridge on a host that the guest's virtio NIC is on there.
func bridgeOf(f *Facts, name string) *iommu.Bridge {
	if i := slices.IndexFunc(f.Bridges, func(b iommu.Bridge) bool { return b.Name == name }); i >= 0 {
		return &f.Bridges[i]
	}
	return nil
}

// portOf is a port of a bridge, which it has.
func portOf(b *iommu.Bridge, name string) iommu.BridgePort {
	return b.Ports[slices.IndexFunc(b.Ports, func(p iommu.BridgePort) bool { return p.Name == name })]
}

// uplinks are the ports of a bridge that lead to a PF, with the VLAN that the way tags with; 0 for none. A bond that
// has the PF leads to it, too.
func (f *Facts) uplinks(b *iommu.Bridge, p *Port) map[string]int {
	leads := func(name string) bool { return name == p.Netdev || name == p.Master && p.Master != b.Name }
	out := map[string]int{}
	for _, port := range b.Ports {
		if leads(port.Name) {
			out[port.Name] = 0
		}
		for _, v := range f.VLANs {
			if v.Name == port.Name && leads(v.Over) {
				out[port.Name] = v.ID
			}
		}
	}
	return out
}

// standby is the bridge that the guest's virtio NIC is to be on.
func (m *move) standby() string {
	if m.by != ByFailover || m.guest.VM == nil {
		return ""
	}
	return m.guest.VM.Standby
}

func checkBridge(m *move) Line {
	name, c := m.standby(), m.drawn()
	if name == "" {
		return Line{}
	}
	b := bridgeOf(m.to, name)
	switch {
	case b == nil:
		return refuse(inSysNet, "%s has no bridge %s, which the guest's virtio NIC is on", m.to.Host, name)
	case !b.Up:
		return refuse(inSysNet, "bridge %s of %s is down (ip link set %s up)", name, m.to.Host, name)
	case c != nil && len(m.to.uplinks(b, c.pf)) == 0:
		return refuse(inSysNet, "no port of bridge %s of %s leads to %s: on the virtio NIC the guest would be cut "+
			"off", name,
			m.to.Host, c.pf.Netdev)
	}
	if a := bridgeOf(m.from, name); a != nil && b.MTU < a.MTU {
		return refuse(inSysNet, "bridge %s of %s has MTU %d, and that of %s has %d", name, m.to.Host, b.MTU,
			m.from.Host, a.MTU)
	}
	return ok(inSysNet, "bridge %s of %s is up, and leads to its PF", name, m.to.Host)
}

// checkVLAN asks whether the virtio NIC reaches the VLAN that the VF is tagged with.
func checkVLAN(m *move) Line {
	name, c := m.standby(), m.drawn()
	if name == "" || c == nil || len(m.guest.Devices) == 0 {
		return Line{}
	}

	b := bridgeOf(m.to, name)
	if b == nil {
		return Line{}
	}

	const where = inSysNet + ", proc/net/vlan/config, bridge's VLANs"
	want := 0
	if v := m.guest.Devices[0].Settings[sriov.VLAN]; v != "" {
		if _, err := fmt.Sscan(v, &want); err != nil {
			return unknown(where, "the guest's VLAN %q is invalid", v)
		}
	}

	ways := m.to.uplinks(b, c.pf)
	for port, tag := range ways {
		if b.Filtering && portOf(b, port).VLANs == nil {
			return unknown(where, "what VLANs %s, a port of bridge %s of %s, lets through is not known", port, name,
				m.to.Host)
		}
		if carries(b, port, tag, want) {
			if want == 0 {
				return ok(where, "bridge %s of %s carries frames without a tag, as the VF does", name, m.to.Host)
			}
			return ok(where, "bridge %s of %s leads to VLAN %d, as the VF does", name, m.to.Host, want)
		}
	}

	if len(ways) == 0 {
		return Line{}
	}

	if want == 0 {
		return refuse(where, "bridge %s of %s tags what the guest sends, and the VF does not: on the virtio NIC the "+
			"guest would be in another network", name, m.to.Host)
	}

	return refuse(where, "the VF is in VLAN %d, and bridge %s of %s does not lead there: on the virtio NIC the guest "+
		"would be in another network (give the bridge %s.%d as a port, or VLAN filtering with that PVID)", want, name,
		m.to.Host,
		c.pf.Netdev, want)
}

// carries reports whether frames of a new port of a bridge leave it by a way that tags with tag, in a VLAN on the wire,
// 0 for none.
func carries(b *iommu.Bridge, port string, tag, want int) bool {
	if !b.Filtering {
		return tag == want
	}
	for _, v := range portOf(b, port).VLANs {
		if v.ID != b.PVID {
			continue
		}
		if v.Untagged {
			return tag == want
		}
		return tag == 0 && v.ID == want
	}
	return false
}

func checkAddress(m *move) Line {
	if len(m.guest.Devices) == 0 {
		return Line{}
	}
	mac := m.guest.Devices[0].Settings[sriov.MAC]
	if strings.Trim(mac, "0:") == "" {
		if m.by == ByFailover {
			return refuse(inLease, "the guest's VF has no MAC address that both NICs could have (assign with --mac)")
		}
		return warn(inLease, "the guest's VF has no fixed MAC address: it gets another one on %s", m.to.Host)
	}
	if i := slices.IndexFunc(m.to.Used, func(u Used) bool { return strings.EqualFold(u.MAC, mac) }); i >= 0 {
		return refuse(inSysNet+", "+inLease, "%s is in use on %s: %s", mac, m.to.Host, m.to.Used[i].What)
	}
	if !m.to.Live {
		return unknown(inSysNet+", "+inLease, "no interface and no guest of %s has %s; what its VFs have, no "+
			"snapshot tells",
			m.to.Host, mac)
	}
	return ok(inSysNet+", "+inLease, "nothing on %s has %s", m.to.Host, mac)
}

// checkSameNetwork asks whether the destination hears the guest: its bridge has then learned the guest's address on the
// uplink.
func checkSameNetwork(m *move) Line {
	if len(m.guest.Devices) == 0 || m.by == ByVFIO && m.to.Heard == nil {
		return Line{}
	}
	const where = "the bridges' forwarding tables"
	mac := strings.ToLower(m.guest.Devices[0].Settings[sriov.MAC])
	switch on, heard := m.to.Heard[mac]; {
	case m.to.Heard == nil:
		return unknown(where, "whether both hosts are in one network is not known")
	case heard:
		return ok(where, "%s hears the guest, on %s", m.to.Host, on)
	}
	return warn(where, "%s has not heard the guest: whether both hosts are in one network is unknown (a bridge "+
		"forgets silent guests)", m.to.Host)
}
