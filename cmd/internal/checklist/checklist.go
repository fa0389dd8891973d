// Package checklist goes through all that a guest's devices need, from the firmware to its VMM, and says of each thing
// whether it is there. It changes nothing.
package checklist

import (
	"cmp"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/lease"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// Answer is what a line comes to.
type Answer string

// The answers. What could not be looked at is Unknown.
const (
	OK      Answer = "ok"
	No      Answer = "no"
	Unknown Answer = "unknown"
)

// Line is one line of the list.
type Line struct {
	Name     string // short and stable, e.g. memlock
	Device   string // that it is about; "" if it is the guest or the host
	Answer   Answer
	Text     string // what was found, as a sentence without its end
	Evidence []Evidence
	Hint     string // a command, or what else mends it; "" if there is nothing to mend, or nothing known
}

// Evidence is where something was seen.
type Evidence struct {
	File  string // from the host's root
	Value string // what it holds, or the part of it that counts, or why that is not known; "" if the file is not there
}

// Options are what is known of the guest beside its lease.
type Options struct {
	Memory uint64 // in bytes; 0: not known
}

// list is one checklist that is being made.
type list struct {
	host     *iommu.Host
	topology *iommu.Topology
	manager  *lease.Manager
	lease    *lease.Lease
	look     lease.Look
	options  Options
	unitPIDs []int           // of the lease's systemd unit
	devices  []*iommu.Device // of the lease that are there
	back     string          // what brings back the first one that is not
	lines    []Line
}

// Guest goes through what a guest's lease needs.
func Guest(m *lease.Manager, l *lease.Lease, o Options) ([]Line, error) {
	pids, err := lease.UnitPIDs(m.Host(), l.Unit)
	if err != nil {
		return nil, err
	}
	c := &list{
		host: m.Host(), topology: m.Topology, manager: m, lease: l, look: m.LookAt(l), options: o, unitPIDs: pids,
	}
	c.iommu()
	c.interrupts()
	for i := range l.Devices {
		if d := c.present(&l.Devices[i]); d != nil {
			c.devices = append(c.devices, d)
		}
	}

	for _, step := range []func() error{
		c.each(c.unit), c.each(c.group), c.each(c.driver), c.each(c.nodes), c.regions, c.memlock, c.phase, c.quarantine,
		c.changes, c.holders, c.kernel, c.last,
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return c.lines, nil
}

// each makes a step of one for each device.
func (c *list) each(step func(*iommu.Device) error) func() error {
	return func() error {
		for _, d := range c.devices {
			if err := step(d); err != nil {
				return err
			}
		}
		return nil
	}
}

func (c *list) add(l Line) { c.lines = append(c.lines, l) }

// iommu is whether one is on.
func (c *list) iommu() {
	var names []string
	for _, u := range c.topology.Units {
		names = append(names, u.Name)
	}
	l := Line{
		Name: "iommu", Answer: OK, Text: "an IOMMU is on",
		Evidence: []Evidence{{"sys/class/iommu", cmp.Or(strings.Join(names, ", "), "empty")}},
	}
	if len(names) == 0 {
		off := iommu.WhyOff(c.host, c.topology)
		l.Answer, l.Text, l.Hint = No, "no IOMMU is on: "+off.Why, off.Hint
	}
	c.add(l)
}

// interrupts is whether they are kept apart, without which VFIO opens no device.
func (c *list) interrupts() {
	l := Line{Name: "interrupts", Evidence: []Evidence{{"sys/kernel/irq/*/chip_name", ""}}}
	switch on := c.topology.InterruptRemapping; {
	case on == nil:
		l.Answer, l.Text = Unknown, "whether interrupts are remapped is not known"
		l.Evidence[0].Value = "none tells"
	case *on:
		l.Answer, l.Text, l.Evidence[0].Value = OK, "interrupts are remapped", "IR- or ITS-"
	default:
		l.Answer, l.Text, l.Hint = No, "interrupts are not remapped, and VFIO opens no device", "viaduct doctor"
		l.Evidence[0].Value = "without IR- or ITS-"
	}
	c.add(l)
}

const devicesDir = "sys/bus/pci/devices"

// present finds a device of the lease, if it is there and is what was assigned.
func (c *list) present(of *lease.Device) *iommu.Device {
	file := path.Join(devicesDir, of.Address.String(), "modalias")
	l := Line{Name: "present", Device: of.Address.String(), Answer: OK, Evidence: []Evidence{{file, ""}}}
	d, err := c.topology.Find(of.Address)
	switch {
	case err != nil:
		c.absent(&l, of)
	case d.ID != of.ID || of.Nowhere:
		l.Answer, l.Text, l.Evidence[0].Value = No, "another device is there than was assigned", d.Modalias()
		l.Hint = release(c.lease.Guest)
	default:
		l.Text, l.Evidence[0].Value = "it is there", d.Modalias()
	}
	c.add(l)
	if l.Answer == No {
		return nil
	}
	return d
}

// absent says what brings a device back. A rescan of the bus finds no VF: its PF has to make it again.
func (c *list) absent(l *Line, of *lease.Device) {
	l.Answer, l.Text, l.Hint = No, "it is not there", "echo 1 > /sys/bus/pci/rescan"
	if of.PF != nil {
		l.Text += ": it was a VF"
		l.Hint = "viaduct apply, or viaduct vf create PF N"
		if pf, all := c.parent(of.Address); pf != nil {
			has, needs := len(pf.SRIOV.VFs), 0
			for i, vf := range all {
				if slices.ContainsFunc(c.lease.Devices, func(d lease.Device) bool { return d.Address == vf }) {
					needs = i + 1
				}
			}
			l.Text = fmt.Sprintf("it is not there: it was a VF of %s, which has %d", pf.Name, has)
			l.Evidence = append(l.Evidence, Evidence{path.Join(devicesDir, pf.Name, "sriov_numvfs"), strconv.Itoa(has)})
			l.Hint = fmt.Sprintf("viaduct apply, or viaduct vf create %s %d", pf.Name, max(needs, has))
		}
	}
	c.back = cmp.Or(c.back, l.Hint)
}

// parent is the PF of which a VF would be at an address, with where all of its VFs would be; nil if there is none.
func (c *list) parent(vf iommu.Address) (pf *iommu.Device, vfs []iommu.Address) {
	c.topology.All(func(d *iommu.Device) bool {
		if !d.PCI || d.SRIOV == nil {
			return true
		}
		all, err := iommu.VFAddresses(c.host, d.Address)
		if err == nil && slices.Contains(all, vf) {
			pf, vfs = d, all
		}
		return pf == nil
	})
	return pf, vfs
}

func release(guest string) string { return "viaduct release " + quote(guest) }

// record is where the lease is written down: in what outlives the boot, if it is it is restored after the boot.
func (c *list) record() string {
	name := holder.LeasePrefix + url.PathEscape(c.lease.Guest) + ".json"
	if file := path.Join(journal.Dir, name); c.host.Exists(file) {
		return file
	}
	return path.Join(declared.StateDir, name)
}
