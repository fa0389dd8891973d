package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/urfave/cli/v2"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

func showCommand(e *env) *cli.Command {
	var sel iommu.Selector
	return command(&cli.Command{
		Name:      "show",
		Usage:     "show everything known about a device, or about group=N",
		ArgsUsage: "SELECTOR",
		Description: "Reading a serial number wakes a sleeping device; nothing else does.\n\n" +
			"Examples:\n  viaduct show enp1s0\n" +
			"  viaduct show 0000:01:00.0 --json\n" +
			"  viaduct show group=8",
		Flags:        []cli.Flag{e.jsonFlag()},
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) error {
			arg, err := oneArgument(c, "the device")
			if err != nil {
				return err
			}
			if sel, err = iommu.ParseArgument(arg); err != nil {
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
	// Holders are those who were seen; null where nobody can be asked, or where none was seen and not all could be.
	Holders  []holderView  `json:"holders"`
	Guest    *string       `json:"guest"`
	USB      []usbView     `json:"usb_devices"`
	Warnings []warningView `json:"warnings"`

	uses []holder.Holder
}

// holderView is who uses a device, and how.
type holderView struct {
	Kind  holder.Kind `json:"kind"`
	What  string      `json:"what"`
	PID   *int        `json:"pid"`
	Guest *string     `json:"guest"`
}

func viewHolder(h holder.Holder) holderView {
	v := holderView{Kind: h.Kind, What: h.What, Guest: known(h.Guest)}
	if h.PID != 0 {
		v.PID = &h.PID
	}
	return v
}

// usbView is a device on a USB controller's bus.
type usbView struct {
	Port    string  `json:"port"`
	Vendor  string  `json:"vendor"`
	Product string  `json:"product"`
	Name    *string `json:"name"`
}

// warningView is what will go wrong when a guest gets the device, with what to do.
type warningView struct {
	What string  `json:"what"`
	Hint *string `json:"cure"`
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
	if id, ok := sel.Group(); ok {
		err = showGroup(e, h, t, names, sel, id)
	} else {
		err = showDevice(e, h, t, names, sel)
	}
	return err
}

func showGroup(e *env, h *iommu.Host, t *iommu.Topology, names *iommu.Names, sel iommu.Selector,
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
	v := showGroupView{groupView: groupOf(g, names, nil), ReservedRegions: viewRegions(regions)}
	if e.json {
		e.printJSON(v)
	} else {
		e.printGroup(h, t, g, v, names)
	}
	return nil
}

func showDevice(e *env, h *iommu.Host, t *iommu.Topology, names *iommu.Names, sel iommu.Selector) error {
	d, err := sel.One(h, t)
	if err != nil {
		return err
	}
	v := showView{
		deviceView:   deviceOf(d, names),
		Parents:      []iommu.Address{},
		ResetMethods: []string{},
		BARs:         []barView{},
		USB:          []usbView{},
		Warnings:     []warningView{},
	}
	if g := t.GroupOf(d); g != nil {
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

	if err := v.look(e, h, t, d, reset); err != nil {
		return err
	}
	if e.json {
		e.printJSON(v)
	} else {
		e.printDevice(h, t, d, &v, reset, names)
	}
	return nil
}

// look fills in who uses the device, and what whoever gives it to a guest should know.
func (v *showView) look(e *env, h *iommu.Host, t *iommu.Topology, d *iommu.Device, reset iommu.Reset) error {
	found, err := holder.Find(h, []*iommu.Device{d})
	told := !errors.Is(err, holder.ErrNotCaptured)
	switch {
	case !told:
		// Files tell of some.
		if found, err = holder.Glance(h, t); err != nil && !errors.Is(err, holder.ErrBlind) {
			return err
		}
	case errors.Is(err, holder.ErrBlind):
		e.note("not all uses are shown: %v", err)
	case err != nil:
		return err
	default:
		v.Holders = []holderView{}
	}
	for _, u := range found {
		if u.Device != d.Name {
			continue
		}
		v.uses = append(v.uses, u)
		if told {
			v.Holders = append(v.Holders, viewHolder(u))
		}
		if u.Kind == holder.Lease {
			v.Guest = known(u.Guest)
		}
	}

	if d.PCI {
		usb, err := iommu.USBDevices(h, d.Address)
		if err != nil {
			return err
		}
		for _, u := range usb {
			v.USB = append(v.USB, usbView{u.Port, *hex(4, uint32(u.Vendor)), *hex(4, uint32(u.Product)), known(u.Name)})
		}
	}
	v.Warnings, err = warnings(h, t, d, v, reset)
	return err
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
