// Package vmm says to each virtual machine monitor which devices a guest has, in the words of that monitor.
package vmm

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"

	"viaduct/internal/shell"
	"viaduct/iommu"
)

// Guest is a guest with its devices.
type Guest struct {
	Name    string
	Devices []Device
	// Standby is the bridge that a virtio NIC is on, which stands in for the first VF while the guest migrates; "" for
	// none.
	Standby string
	// Movable says that the first device is where it can be unplugged from, as it is with a standby.
	Movable bool
	// Absent says that the first device is plugged later, by the machine protocol.
	Absent bool
	// Migrates says that the devices' state comes from another host: one that cannot take it is an error at the start.
	Migrates bool
	// Socket is of QEMU's machine protocol, for viaduct alone; "" for none.
	Socket string
}

// Device is one device of a guest.
type Device struct {
	Address iommu.Address
	Group   int
	Nodes   []string // what a VMM opens
	VF      bool
	NIC     bool
	MAC     string // that the host gave it, "" if none
	VLAN    string // that the host tags with, "" if none
	QoS     string
	Proto   string
}

// Format is how a VMM, or what starts one, is told.
type Format struct {
	Name                string
	Args                func(*Guest) []string // words of a command line; nil if it takes none
	Text                func(*Guest) (string, error)
	Cannot              string // what is not to be had this way
	Persist             bool   // its guests outlive a boot
	Standby             bool   // it can have one
	OwnDriver           bool   // it takes devices to a driver of its own, not to VFIO's
	Placed              bool   // its arguments stand in the middle of a command
	IOMMUFD             bool   // its VMM opens /dev/iommu
	Groups              bool   // what is printed has numbers of IOMMU groups, which a boot may change
	AvoidsReservedRange bool   // it keeps guest memory off the range that AMD's IOMMUs reserve
}

// Formats are all formats but json, which is the lease itself.
var Formats = []Format{
	{Name: "qemu", Args: qemu, Standby: true, AvoidsReservedRange: true},
	{Name: "qemu-iommufd", Args: qemuIOMMUFD, Standby: true, AvoidsReservedRange: true, IOMMUFD: true,
		Cannot: "this needs QEMU 8.2 or newer, and a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV; " +
			"otherwise use the format qemu"},
	{Name: "libvirt", Text: libvirt, Persist: true, Standby: true, AvoidsReservedRange: true,
		Cannot: "libvirt opens the IOMMU group, not iommufd; the lease ends with viaduct release, not " +
			"with the domain (viaduct install --libvirt scrubs between its starts)"},
	{
		Name: "cdi",
		Text: cdi, Groups: true,
		Cannot: "a CDI spec passes nodes to a container; a VMM in it still needs its own arguments, and memory that " +
			"it may lock",
	},
	{Name: "env", Text: env, Groups: true},
	{
		Name:   "cloud-hypervisor",
		Args:   cloudHypervisor,
		Cannot: "Cloud Hypervisor has no failover pair, and opens the IOMMU group, not iommufd",
	},
	{Name: "crosvm", Args: crosvm, Cannot: "crosvm has no failover pair, and opens the IOMMU group, not iommufd"},
	{
		Name: "incus",
		Text: incus,
		Cannot: "Incus binds the device to vfio-pci itself, and gives it back when the instance stops; viaduct " +
			"release ends the lease; containers cannot have the device; no live migration",
	},
	{
		Name:                "proxmox",
		Text:                proxmox,
		Persist:             true,
		AvoidsReservedRange: true,
		Cannot: "Proxmox VE takes pcie=1 behind the address only with machine: q35; its guest does not migrate; the " +
			"lease ends with viaduct release, not with the guest",
	},
	{
		Name:      "xen",
		Text:      xen,
		OwnDriver: true,
		Cannot: "Xen owns the IOMMU: xl binds the device to pciback (seize=1), not vfio; dom0 shows no " +
			"IOMMU groups, so you must assign the whole group; no failover pair",
	},
	{
		Name: "kata",
		Args: kata, Placed: true, Groups: true,
		Cannot: "Kata needs vfio_mode and hotplug_vfio (or cold_plug_vfio) in its configuration.toml, and passes " +
			"whole IOMMU groups; no failover pair",
	},
}

// Names are the names of all formats, json included.
func Names() []string {
	out := []string{"json"}
	for _, f := range Formats {
		out = append(out, f.Name)
	}
	return out
}

// Find is a format by its name.
func Find(name string) (*Format, bool) {
	i := slices.IndexFunc(Formats, func(f Format) bool { return f.Name == name })
	if i < 0 {
		return nil, false
	}
	return &Formats[i], true
}

// Print is what is to be pasted, with its newline.
func (f *Format) Print(g *Guest) (string, error) {
	if f.Args == nil {
		return f.Text(g)
	}
	var words []string
	for _, w := range f.Args(g) {
		words = append(words, shell.Quote(w))
	}
	return strings.Join(words, " ") + "\n", nil
}

// comma doubles the commas of a value, as QEMU's options want.
func comma(value string) string { return strings.ReplaceAll(value, ",", ",,") }

func qemu(g *Guest) []string { return qemuDevices(g, "") }

func qemuIOMMUFD(g *Guest) []string {
	return append([]string{"-object", "iommufd,id=viaduct"}, qemuDevices(g, ",iommufd=viaduct")...)
}

// The names that QEMU has for what a guest that can move has.
const (
	StandbyID = "viaduct-standby"
	PrimaryID = "viaduct-primary"
	standbyAt = "viaduct-port0"
	primaryAt = "viaduct-port1"
)

// qemuDevices are the devices; with a standby, the first is a failover pair with it, which needs a port that it can be
// unplugged from (docs/system/virtio-net-failover.rst).
func qemuDevices(g *Guest, more string) []string {
	var out []string
	if g.Migrates {
		more += ",enable-migration=on"
	}

	port := func(id, number string) {
		out = append(out, "-device", "pcie-root-port,id="+id+",chassis="+number+",slot="+number)
	}

	for i, d := range g.Devices {
		pair := ""
		if i == 0 && g.Standby != "" {
			out = append(out, "-netdev", "bridge,id=viaduct-net,br="+comma(g.Standby))
			port(standbyAt, "240")
			port(primaryAt, "241")
			out = append(out, "-device",
				"virtio-net-pci,netdev=viaduct-net,id="+StandbyID+",bus="+standbyAt+",mac="+d.MAC+
					",failover=on")
			pair = ",id=" + PrimaryID + ",bus=" + primaryAt + ",failover_pair_id=" + StandbyID
		} else if i == 0 && g.Movable {
			port(primaryAt, "241")
			pair = ",id=" + PrimaryID + ",bus=" + primaryAt
		}
		if i > 0 || !g.Absent {
			out = append(out, "-device", "vfio-pci,host="+d.Address.String()+more+pair)
		}
	}

	if g.Socket != "" {
		out = append(out, "-qmp", "unix:"+comma(g.Socket)+",server=on,wait=off")
	}

	return out
}

// Plugged are the words of device_add for the first device of a guest that can move.
func (f *Format) Plugged(a iommu.Address, standby bool) map[string]any {
	out := map[string]any{"driver": "vfio-pci", "host": a.String(), "id": PrimaryID, "bus": primaryAt}
	if standby {
		out["failover_pair_id"] = StandbyID
	}
	if f.Name == "qemu-iommufd" {
		out["iommufd"] = "viaduct"
	}
	return out
}

// Devices is the word of a command that stands for the devices' arguments.
const Devices = "{devices}"

// Substitute puts a guest's devices into the words of a command.
func (f *Format) Substitute(words []string, g *Guest) []string {
	var devices []string
	if f.Args != nil {
		devices = f.Args(g)
	}
	first := g.Devices[0]
	values := strings.NewReplacer("{address}", first.Address.String(), "{group}", fmt.Sprint(first.Group), "{mac}",
		first.MAC, "{vlan}", first.VLAN)
	var out []string
	placed := false
	for _, w := range words {
		if w == Devices {
			out, placed = append(out, devices...), true
			continue
		}
		placed = placed || strings.Contains(w, "{address}") || strings.Contains(w, "{group}")
		out = append(out, values.Replace(w))
	}
	if !placed {
		out = append(out, devices...)
	}
	return out
}

// Address is a PCI address as libvirt writes it (virPCIDeviceAddressFormat).
func addressXML(a iommu.Address) string {
	return fmt.Sprintf("<address type='pci' domain='0x%04x' bus='0x%02x' slot='0x%02x' function='0x%x'/>", a.Domain,
		a.Bus, a.Device, a.Function)
}

func escape(s string) string {
	var b strings.Builder
	// A strings.Builder takes all.
	_ = xml.EscapeText(&b, []byte(s))
	return b.String()
}

// libvirt has interfaces for VFs of NICs that have a MAC address, and plain host devices for all else
// (docs/formatdomain.rst). Its managed='no' leaves drivers to viaduct; it relabels and owns the nodes itself.
func libvirt(g *Guest) (string, error) {
	var b strings.Builder
	if g.Standby != "" && len(g.Devices) > 0 && g.Devices[0].interfaceXML() {
		fmt.Fprintf(
			&b,
			"<interface type='bridge'>\n  <mac address='%s'/>\n  <source bridge='%s'/>\n"+
				"  <model type='virtio'/>\n  <teaming type='persistent'/>\n"+
				"  <alias name='ua-viaduct-standby'/>\n</interface>\n",
			g.Devices[0].MAC,
			escape(g.Standby),
		)
	}
	for i, d := range g.Devices {
		d.libvirt(&b, i == 0 && g.Standby != "")
	}
	return b.String(), nil
}

// PluggedLibvirt is what is plugged into a domain that runs, for its first device.
func PluggedLibvirt(g *Guest) string {
	var b strings.Builder
	g.Devices[0].libvirt(&b, g.Standby != "")
	return b.String()
}

// interfaceXML reports whether libvirt has a device as an interface. It does not know all that a VF may have, and would
// undo that.
func (d *Device) interfaceXML() bool {
	return d.VF && d.NIC && d.MAC != "" && (d.QoS == "" || d.QoS == "0") && (d.Proto == "" || d.Proto == "802.1q")
}

// libvirt writes one device, which may have a virtio NIC to stand in.
func (d *Device) libvirt(b *strings.Builder, paired bool) {
	if !d.interfaceXML() {
		fmt.Fprintf(b,
			"<hostdev mode='subsystem' type='pci' managed='no'>\n  <source>\n    %s\n  </source>\n</hostdev>\n",
			// Which its schema does not have there.
			strings.Replace(addressXML(d.Address), " type='pci'", "", 1))
		return
	}
	teaming, vlan := "", ""
	if paired {
		teaming = "  <teaming type='transient' persistent='ua-viaduct-standby'/>\n"
	}
	if d.VLAN != "" {
		vlan = fmt.Sprintf("  <vlan>\n    <tag id='%s'/>\n  </vlan>\n", d.VLAN)
	}
	fmt.Fprintf(
		b,
		"<interface type='hostdev' managed='no'>\n  <mac address='%s'/>\n  <source>\n    %s\n"+
			"  </source>\n%s%s</interface>\n",
		d.MAC,
		addressXML(d.Address),
		vlan,
		teaming,
	)
}

// LibvirtNetwork is a libvirt network from which domains draw VFs (docs/formatnetwork.rst).
func LibvirtNetwork(name string, vfs []iommu.Address) string {
	var b strings.Builder
	fmt.Fprintf(&b, "<network>\n  <name>%s</name>\n  <forward mode='hostdev' managed='no'>\n", escape(name))
	for _, a := range vfs {
		fmt.Fprintf(&b, "    %s\n", addressXML(a))
	}
	b.WriteString("  </forward>\n</network>\n")
	return b.String()
}

// The fields of a CDI spec (github.com/cncf-tags/container-device-interface, SPEC.md).
type cdiSpec struct {
	Version string      `json:"cdiVersion"`
	Kind    string      `json:"kind"`
	Devices []cdiDevice `json:"devices"`
}

type cdiDevice struct {
	Name  string   `json:"name"`
	Edits cdiEdits `json:"containerEdits"`
}

type cdiEdits struct {
	Env   []string  `json:"env"`
	Nodes []cdiNode `json:"deviceNodes"`
}

type cdiNode struct {
	Path string `json:"path"`
}

// cdi is a spec of one device, viaduct/guest=NAME, that has all nodes.
func cdi(g *Guest) (string, error) {
	changed := false
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-.:", r) {
			return r
		}
		changed = true
		return '_'
	}, g.Name)
	letter := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }
	if changed || !letter(name[0]) || strings.TrimRight(name, "_-.:") != name {
		// Two guests must not come to be one.
		name = fmt.Sprintf("g.%s.%x", strings.Trim(name, "_-.:"), crc32.ChecksumIEEE([]byte(g.Name)))
	}

	d := cdiDevice{Name: name}
	for _, kv := range pairs(g) {
		d.Edits.Env = append(d.Edits.Env, kv[0]+"="+kv[1])
	}
	for _, n := range nodes(g) {
		d.Edits.Nodes = append(d.Edits.Nodes, cdiNode{n})
	}
	b, err := json.MarshalIndent(cdiSpec{"0.3.0", "viaduct/guest", []cdiDevice{d}}, "", "  ")
	return string(b) + "\n", err
}

// nodes are all that a VMM opens, those of the two ways to the IOMMU first.
func nodes(g *Guest) []string {
	var out []string
	for _, d := range g.Devices {
		for _, n := range d.Nodes {
			if !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
	}
	own := func(n string) bool { return strings.HasPrefix(n, "/dev/vfio/devices/") }
	if slices.ContainsFunc(out, own) {
		out = append([]string{"/dev/iommu"}, out...)
	}
	if slices.ContainsFunc(out, func(n string) bool { return strings.HasPrefix(n, "/dev/vfio/") && !own(n) }) {
		out = append([]string{"/dev/vfio/vfio"}, out...)
	}
	return out
}

// pairs are the variables of env.
func pairs(g *Guest) [][2]string {
	var addresses, groups, macs, vlans []string
	for _, d := range g.Devices {
		addresses = append(addresses, d.Address.String())
		groups = append(groups, fmt.Sprint(d.Group))
		macs, vlans = append(macs, orDash(d.MAC)), append(vlans, orDash(d.VLAN))
	}
	return [][2]string{
		{
			"VIADUCT_GUEST",
			g.Name,
		}, {"VIADUCT_DEVICES", strings.Join(addresses, " ")}, {"VIADUCT_GROUPS", strings.Join(groups, " ")},
		{
			"VIADUCT_NODES",
			strings.Join(nodes(g), " "),
		}, {"VIADUCT_MACS", strings.Join(macs, " ")}, {"VIADUCT_VLANS", strings.Join(vlans, " ")},
	}
}

// orDash keeps a list's places.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func env(g *Guest) (string, error) {
	var b strings.Builder
	for _, kv := range pairs(g) {
		fmt.Fprintf(&b, "%s=%s\n", kv[0], shell.Quote(kv[1]))
	}
	return b.String(), nil
}

// Environment are the variables of env, for a process.
func Environment(g *Guest) []string {
	var out []string
	for _, kv := range pairs(g) {
		out = append(out, kv[0]+"="+kv[1])
	}
	return out
}

func sysfs(a iommu.Address) string { return "/sys/bus/pci/devices/" + a.String() }

// cloudHypervisor: one --device takes all devices (docs/vfio.md, docs/device_model.md).
func cloudHypervisor(g *Guest) []string {
	out := []string{"--device"}
	for _, d := range g.Devices {
		out = append(out, "path="+sysfs(d.Address)+"/")
	}
	return out
}

func crosvm(g *Guest) []string {
	var out []string
	for _, d := range g.Devices {
		out = append(out, "--vfio", sysfs(d.Address))
	}
	return out
}

func incus(g *Guest) (string, error) {
	var b strings.Builder
	for i, d := range g.Devices {
		fmt.Fprintf(&b, "incus config device add %s viaduct%d pci address=%s\n", shell.Quote(g.Name), i, d.Address)
	}
	return b.String(), nil
}

// proxmox are lines of a guest's /etc/pve/qemu-server/VMID.conf (qm.conf(5), hostpci[n]).
func proxmox(g *Guest) (string, error) {
	var b strings.Builder
	for i, d := range g.Devices {
		fmt.Fprintf(&b, "hostpci%d: %s\n", i, d.Address)
	}
	return b.String(), nil
}

// xen is a line of an xl.cfg (xl-pci-configuration(5)).
func xen(g *Guest) (string, error) {
	var out []string
	for _, d := range g.Devices {
		out = append(out, fmt.Sprintf("'%s,seize=1'", d.Address))
	}
	return "pci = [ " + strings.Join(out, ", ") + " ]\n", nil
}

// kata is for ctr, nerdctl and docker, with Kata as the runtime.
func kata(g *Guest) []string {
	var out []string
	for _, d := range g.Devices {
		if word := fmt.Sprintf("/dev/vfio/%d", d.Group); !slices.Contains(out, word) {
			out = append(out, "--device", word)
		}
	}
	return out
}
