package main

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/iommu"
)

func showCommand(e *env) *cli.Command {
	var sel iommu.Selector
	return command(&cli.Command{
		Name:      "show",
		Usage:     "one device, or with group=N one group: everything known",
		ArgsUsage: "SELECTOR",
		Description: "Serial numbers are read from config space, which wakes a sleeping device; nothing else of a device is.\n\n" +
			"Examples:\n  viaduct show enp1s0\n  viaduct show 0000:01:00.0 --json\n  viaduct show group=8        # with its reserved regions",
		Flags:        []cli.Flag{e.jsonFlag()},
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) error {
			arg, err := oneArgument(c, "the device")
			if err != nil {
				return err
			}
			if sel, err = iommu.ParseSelector(arg); err != nil {
				return err
			}
			return runShow(e, sel)
		},
	})
}

// showView is `show SELECTOR --json`: the device as in `list`, and all the rest.
type showView struct {
	deviceView
	Revision        string              `json:"revision"`
	SubsystemVendor string              `json:"subsystem_vendor"`
	SubsystemDevice string              `json:"subsystem_device"`
	Modalias        string              `json:"modalias"`
	VendorName      *string             `json:"vendor_name"`
	Group           *groupBrief         `json:"group"`
	Unit            *string             `json:"iommu_unit"`
	Path            string              `json:"path"`
	Parents         []iommu.Address     `json:"parents"`
	Serial          *string             `json:"serial"`
	ClassDevices    map[string][]string `json:"class_devices"`
	MACs            map[string]string   `json:"mac_addresses"`
	PowerState      *string             `json:"power_state"`
	ResetMethods    []string            `json:"reset_methods"`
	CanReset        *bool               `json:"can_reset"`
	Reset           *resetView          `json:"reset"`
	VFIODevice      *string             `json:"vfio_device"`
	BootVGA         bool                `json:"boot_vga"`
	Link            *linkView           `json:"link"`
	BARs            []barView           `json:"bars"`
	VFs             *vfsView            `json:"vfs"`
}

type groupBrief struct {
	ID       int      `json:"id"`
	Type     *string  `json:"type"`
	Viable   bool     `json:"viable"`
	Blockers []string `json:"blockers"`
	Devices  []string `json:"devices"`
}

type resetView struct {
	Way  iommu.ResetWay `json:"way"`
	With []string       `json:"with"`
}

type linkView struct {
	Speed    string `json:"speed"`
	Width    int    `json:"width"`
	MaxSpeed string `json:"max_speed"`
	MaxWidth int    `json:"max_width"`
}

type barView struct {
	Index        int    `json:"index"`
	Size         uint64 `json:"size"`
	Kind         string `json:"kind"`
	Prefetchable bool   `json:"prefetchable"`
}

type vfsView struct {
	Addresses []iommu.Address `json:"addresses"`
	Device    string          `json:"device"`
	Offset    int             `json:"offset"`
	Stride    int             `json:"stride"`
	Autoprobe *bool           `json:"autoprobe"`
	MSIXPool  *int            `json:"msix_pool"`
}

// showGroupView is `show group=N --json`.
type showGroupView struct {
	groupView
	ReservedRegions []regionView `json:"reserved_regions"`
}

type regionView struct {
	Start string `json:"start"`
	End   string `json:"end"`
	Type  string `json:"type"`
}

func regionOf(r iommu.Region) regionView {
	return regionView{fmt.Sprintf("%#x", r.Start), fmt.Sprintf("%#x", r.End), r.Type}
}

func runShow(e *env, sel iommu.Selector) error {
	h, t, err := e.look()
	if err != nil {
		return err
	}
	defer h.Close()
	names := iommu.OpenNames(h)
	defer names.Close()
	w := bufio.NewWriter(e.stdout)
	if id, ok := sel.Group(); ok {
		err = showGroup(e, w, h, t, names, sel, id)
	} else {
		err = showDevice(e, w, h, t, names, sel)
	}
	if err != nil {
		return err
	}
	return w.Flush()
}

func showGroup(e *env, w io.Writer, h *iommu.Host, t *iommu.Topology, names *iommu.Names, sel iommu.Selector,
	id int) error {
	g, err := t.Group(id)
	if err != nil {
		// Which knows what groups there are.
		_, err = sel.Resolve(h, t)
		return err
	}

	regions, err := iommu.ReservedRegions(h, id)
	if err != nil {
		return err
	}
	v := showGroupView{groupView: groupOf(g, names, nil), ReservedRegions: []regionView{}}
	for _, r := range regions {
		v.ReservedRegions = append(v.ReservedRegions, regionOf(r))
	}
	if e.json {
		return writeJSON(w, v)
	}

	f := fields{w}
	f.add("group", "%d", id)
	f.text("type", known(g.Type))
	f.add("viable", "%s", viability(v.Viable, v.Blockers))
	for i := range g.Devices {
		d := &g.Devices[i]
		f.add(roleText(d.Role()), "%s", treeLine(d, names))
	}

	for _, r := range v.ReservedRegions {
		f.add("reserved", "%s - %s %s", r.Start, r.End, r.Type)
	}
	return nil
}

// roleText is a device's role as the word before it.
func roleText(r iommu.Role) string {
	if r == iommu.RoleGuest {
		return "guest's"
	}
	return string(r)
}

func viability(viable bool, blockers []string) string {
	switch {
	case viable:
		return "yes"
	case len(blockers) == 0:
		return "no: VFIO made it in its noiommu mode, and no IOMMU is in front of it"
	}
	return "no: the host uses " + strings.Join(blockers, ", ")
}

func showDevice(e *env, w io.Writer, h *iommu.Host, t *iommu.Topology, names *iommu.Names, sel iommu.Selector) error {
	d, err := sel.One(h, t)
	if err != nil {
		return err
	}
	v := showView{
		deviceView:   deviceOf(d, names),
		Parents:      []iommu.Address{},
		ResetMethods: []string{},
		BARs:         []barView{},
	}
	if d.Group != nil {
		g, err := t.Group(*d.Group)
		if err != nil {
			return err
		}
		gv := groupOf(g, names, nil)
		v.Group = &groupBrief{g.ID, gv.Type, gv.Viable, gv.Blockers, nil}
		for i := range g.Devices {
			v.Group.Devices = append(v.Group.Devices, g.Devices[i].Name)
		}
	}

	var reset iommu.Reset
	if d.PCI {
		if err := v.fill(h, d, names); err != nil {
			return err
		}
		if reset, err = iommu.ResetOf(h, t, d); err != nil {
			return err
		}
		v.Reset = &resetView{reset.Way, []string{}}
		for _, o := range reset.With {
			v.Reset.With = append(v.Reset.With, o.Name)
		}
	}

	if e.json {
		return writeJSON(w, v)
	}
	v.print(w, d, reset)
	return nil
}

func (v *showView) fill(h *iommu.Host, d *iommu.Device, names *iommu.Names) error {
	x, err := iommu.ReadDetails(h, d.Address)
	if err != nil {
		return err
	}
	serial, err := iommu.ReadSerial(h, d.Address)
	if err != nil {
		return err
	}
	v.Revision = fmt.Sprintf("%02x", x.Revision)
	v.SubsystemVendor, v.SubsystemDevice = fmt.Sprintf("%04x", d.Subvendor), fmt.Sprintf("%04x", d.Subdevice)
	v.Modalias, v.VendorName, v.Unit = x.Modalias, known(names.Vendor(d.Vendor)), known(x.Unit)
	v.Path, v.Serial, v.PowerState = x.Path, known(serial), known(x.PowerState)
	v.CanReset = x.CanReset
	v.VFIODevice, v.BootVGA = known(x.VFIODevice), x.BootVGA
	v.Parents, v.ResetMethods = append(v.Parents, x.Parents...), append(v.ResetMethods, x.ResetMethods...)
	v.ClassDevices, v.MACs = x.ClassDevices, x.MACs
	if x.Link != nil {
		v.Link = &linkView{x.Link.Speed, x.Link.Width, x.Link.MaxSpeed, x.Link.MaxWidth}
	}

	for _, b := range x.BARs {
		kind := "mem32"
		switch {
		case b.IO:
			kind = "io"
		case b.Wide:
			kind = "mem64"
		}
		v.BARs = append(v.BARs, barView{b.Index, b.Size, kind, b.Prefetchable})
	}

	if x.VFs != nil && d.SRIOV != nil {
		addresses := []iommu.Address{}
		for _, vf := range d.SRIOV.VFs {
			addresses = append(addresses, vf.Address)
		}
		v.VFs = &vfsView{
			addresses,
			fmt.Sprintf("%04x", x.VFs.VFDevice),
			x.VFs.Offset,
			x.VFs.Stride,
			x.VFs.Autoprobe,
			x.VFs.MSIXPool,
		}
	}
	return nil
}

// fields writes "name   value" lines.
type fields struct{ w io.Writer }

// fieldWidth is where the values begin.
const fieldWidth = 14

func (f fields) add(name, format string, a ...any) {
	fmt.Fprintf(f.w, "%-*s%s\n", fieldWidth, name, fmt.Sprintf(format, a...))
}

// text adds a line unless it is not known.
func (f fields) text(name string, value *string) {
	if value != nil {
		f.add(name, "%s", *value)
	}
}

func (v *showView) print(w io.Writer, d *iommu.Device, reset iommu.Reset) {
	f := fields{w}
	f.add("address", "%s", v.Address)
	f.text("name", v.Name)
	f.text("vendor", v.VendorName)
	if d.PCI {
		f.add("ids", "%s subsystem %s:%s class %s revision %s", idText(d), v.SubsystemVendor, v.SubsystemDevice,
			*v.Class, v.Revision)
	}
	driver := "none"
	if d.Driver != "" {
		driver = d.Driver
	}

	f.add("driver", "%s", driver)
	f.text("override", v.DriverOverride)
	if g := v.Group; g == nil {
		f.add("group", "none")
	} else {
		f.add("role", "%s", roleText(v.Role))
		f.add("group", "%s, viable: %s", strings.TrimSpace(fmt.Sprint(g.ID, " ", ptr(g.Type))),
			viability(g.Viable, g.Blockers))
		f.add("members", "%s", strings.Join(g.Devices, ", "))
	}

	f.text("iommu", v.Unit)
	if v.Path != "" {
		f.add("path", "%s", v.Path)
	}
	f.text("serial", v.Serial)
	if v.NUMANode != nil {
		f.add("numa node", "%d", *v.NUMANode)
	}
	if v.PhysFn != nil {
		f.add("vf", "%d of %s", *v.VFIndex, v.PhysFn)
	}

	if v.SRIOV != nil {
		f.add("sr-iov", "%d of %d VFs", v.SRIOV.Enabled, v.SRIOV.Total)
	}
	if v.VFs != nil {
		for _, vf := range d.SRIOV.VFs {
			f.add("", "vf%d %s", vf.Index, vf.Address)
		}
	}

	for _, class := range sortedKeys(v.ClassDevices) {
		var names []string
		for _, n := range v.ClassDevices[class] {
			if mac := v.MACs[n]; class == "net" && mac != "" {
				n += " (" + mac + ")"
			}
			names = append(names, n)
		}
		f.add(class, "%s", strings.Join(names, ", "))
	}

	f.text("power", v.PowerState)
	if d.PCI {
		f.add("reset", "%s", reset)
	}

	if v.Link != nil {
		f.add("link", "%s x%d (at most %s x%d)", v.Link.Speed, v.Link.Width, v.Link.MaxSpeed, v.Link.MaxWidth)
	}
	for _, b := range v.BARs {
		f.add(fmt.Sprintf("bar %d", b.Index), "%s %s%s", size(b.Size), b.Kind,
			map[bool]string{true: " prefetchable"}[b.Prefetchable])
	}
	if v.BootVGA {
		f.add("boot vga", "yes: the console is on it")
	}
}

func ptr(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// size writes a power of two as people read it.
func size(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	i := 0
	for n >= 1024 && n%1024 == 0 && i < len(units)-1 {
		n, i = n/1024, i+1
	}
	return fmt.Sprintf("%d %s", n, units[i])
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
