package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/migrate"
	"viaduct/cmd/internal/vmm"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// assignOptions are what assign and run have in common.
type assignOptions struct {
	lease.Request
	count   int
	mac     string
	vlan    string
	memory  string
	format  string
	standby string
	movable bool
	timeout time.Duration
	preview bool // of a dry run what the VMM gets is printed, and not the writes
}

func (o *assignOptions) flags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "from", Usage: "draw from this pool of host.yaml, PF, or any `SELECTOR`[,count=N][,KEY=VALUE]..., where the keys are those of --set; may be repeated"},
		&cli.IntFlag{Name: "count", Usage: "how many VFs, or groups of other devices", Value: 1, Destination: &o.count},
		&cli.StringFlag{Name: "mac", Usage: "of the VF: an address, or stable for one that is made of the PF's and the index", Destination: &o.mac},
		&cli.StringFlag{Name: "vlan", Usage: "that the PF tags the VF with: `0-4094`", Destination: &o.vlan},
		&cli.StringSliceFlag{Name: "set", Usage: "another setting of the VF: `KEY=VALUE` as of viaduct vf set (may be repeated)"},
		&cli.StringFlag{Name: "memory", Usage: "the guest's, as `8G`: whether the IOMMU can map it, and its VMM lock it", Destination: &o.memory},
		&cli.IntFlag{Name: "numa", Usage: "prefer devices of this NUMA `NODE`", Value: -1},
		&cli.StringFlag{Name: "node-owner", Usage: "who is to own the devices' nodes: `USER[:GROUP]`", Destination: &o.NodeOwner},
		&cli.BoolFlag{Name: "no-reset", Usage: "assign also what nothing can reset afterwards: the next guest finds what this one leaves in it", Destination: &o.NoReset},
		&cli.StringFlag{Name: "failover", Usage: "for migration: a virtio NIC on this `BRIDGE` with the first VF's MAC stands in for it", Destination: &o.standby},
		&cli.BoolFlag{Name: "movable", Usage: "for migration without a virtio NIC: the first device can be unplugged", Destination: &o.movable},
		&cli.DurationFlag{Name: "timeout", Usage: "how long one write, or another viaduct, is waited for", Value: bind.DefaultTimeout, Destination: &o.timeout},
	}
}

// parse reads what the flags say.
func (o *assignOptions) parse(c *cli.Context, format *vmm.Format) error {
	if err := lease.CheckGuest(o.Guest); err != nil {
		return usageError{err}
	}
	if err := o.parseSources(c); err != nil {
		return err
	}
	var err error
	if o.Memory, err = parseSize(o.memory); err != nil {
		return usagef("%s: --memory %q: want a size, as 512M or 8G", c.Command.Name, o.memory)
	}
	if c.IsSet("numa") {
		node := c.Int("numa")
		o.NUMA = &node
	}
	if o.NodeOwner != "" {
		if _, err := bind.ParseNodeOwner(o.NodeOwner); err != nil {
			return usagef("--node-owner: %w", err)
		}
	}
	if o.standby != "" && (format == nil || !format.Standby) {
		return usagef("%s: --failover is for the formats qemu, qemu-iommufd and libvirt", c.Command.Name)
	}
	if o.standby != "" && o.Sources[0].Settings[sriov.MAC] == "" {
		return usagef("%s: --failover needs --mac: both NICs have the same address", c.Command.Name)
	}
	if o.movable && (format == nil || !format.Standby || format.Args == nil) {
		return usagef("%s: --movable is for the formats qemu and qemu-iommufd", c.Command.Name)
	}
	o.VM = &vmm.Machine{Format: o.format, Memory: o.Memory, Standby: o.standby}
	o.Moves, o.Foreign = format != nil && format.Moves, format != nil && format.Foreign
	return checkTimeout(o.timeout)
}

// parseSources reads what is drawn, each with the settings of its VFs; what one does not say, the other flags say.
func (o *assignOptions) parseSources(c *cli.Context) error {
	all := c.StringSlice("from")
	if len(all) == 0 {
		return usagef("%s: from which pool, PF or device? (--from)", c.Command.Name)
	}
	common := c.StringSlice("set")
	if o.mac != "" {
		common = append(common, "mac="+o.mac)
	}
	if o.vlan != "" {
		common = append(common, "vlan="+o.vlan)
	}

	o.Sources = nil
	macs := map[string]int{}
	for _, text := range all {
		s, err := parseSource(text, o.count, common)
		if err != nil {
			return usagef("%s: --from %s: %w", c.Command.Name, text, err)
		}
		if mac := s.Settings[sriov.MAC]; mac != "" && mac != sriov.StableMAC {
			macs[mac] += s.Count
		}
		o.Sources = append(o.Sources, s)
	}
	for mac, n := range macs {
		if n > 1 {
			return usagef("%s: MAC address %s for %d VFs: each needs one of its own (stable makes them)", c.Command.Name, mac,
				n)
		}
	}
	return nil
}

// parseSource reads FROM[,count=N][,KEY=VALUE]..., with so many, and these settings, unless it says otherwise.
func parseSource(text string, count int, common []string) (lease.Source, error) {
	words := strings.Split(text, ",")
	s := lease.Source{From: words[0], Count: count}
	own := map[string]bool{}
	var settings []string
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		if key != "count" {
			settings, own[key] = append(settings, w), true
			continue
		}
		n, err := strconv.Atoi(value)
		if err != nil {
			return s, fmt.Errorf("count %q is no number", value)
		}
		s.Count = n
	}
	for _, w := range common {
		if key, _, _ := strings.Cut(w, "="); !own[key] {
			settings = append(settings, w)
		}
	}

	var err error
	if len(settings) > 0 {
		s.Settings, err = sriov.ParseSettings(settings)
	}
	_, vectors := s.Settings[sriov.MSIX]
	switch {
	case err != nil:
		return s, err
	case s.From == "":
		return s, errors.New("it names nothing")
	case s.Count < 1:
		return s, fmt.Errorf("count %d: want one or more", s.Count)
	case vectors:
		return s, errors.New("msix is no guest's: set it before (viaduct vf set, or host.yaml)")
	}
	return s, nil
}

// parseSize reads a size; "" is 0.
func parseSize(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	digits := strings.TrimRight(strings.TrimSuffix(strings.ToUpper(s), "IB"), "KMGTB")
	n, err := strconv.ParseUint(digits, 10, 32)
	unit := map[string]uint{"": 20, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40} // a plain number is MiB, as in QEMU's -m
	shift, known := unit[strings.TrimSuffix(strings.ToUpper(s), "IB")[len(digits):]]
	if err != nil || !known || n == 0 || n > 1<<20 && shift > 30 {
		return 0, errors.New("no size")
	}
	return n << shift, nil
}

func assignCommand(e *env) *cli.Command {
	var o assignOptions
	return command(&cli.Command{
		Name:      "assign",
		Usage:     "give a guest devices, and print what its VMM needs",
		ArgsUsage: "GUEST --from POOL|PF|SELECTOR...",
		Description: "Draws devices that nobody has, configures and takes them, and writes down whose they are (a lease), until viaduct release.\n" +
			"Asked again for the same guest, the same lease is printed. Safe to be run any number of times at once. A lease is reserved until\n" +
			"a process opens its devices, then active; when that is gone, or nobody came within --ttl, it is dead, which\n" +
			"viaduct release --dead reclaims.\n\n" +
			"Formats: " + strings.Join(vmm.Names(), ", ") + ".\n\n" +
			"Examples:\n  viaduct assign web --from net --vlan 100 --mac stable\n  viaduct assign web --from enp1s0 --format libvirt\n" +
			"  viaduct assign web --from front,vlan=100,mac=stable --from back,count=2\n" +
			"  qemu-system-x86_64 ... $(viaduct assign web --from net --owner-pid $$)\n  viaduct assign db --from 0000:03:00.0 --memory 64G --format json",
		Flags: append(o.flags(),
			&cli.StringFlag{Name: "format", Usage: "what is printed: `qemu|json|...`", Value: "qemu", Destination: &o.format},
			&cli.DurationFlag{Name: "ttl", Usage: "how long the lease waits for its guest to open the devices; 0 is for good", Value: 10 * time.Minute, Destination: &o.TTL},
			&cli.IntFlag{Name: "owner-pid", Usage: "the lease ends with this process", Destination: &o.OwnerPID},
			&cli.StringFlag{Name: "unit", Usage: "the lease ends with this systemd `UNIT`", Destination: &o.Unit},
			&cli.BoolFlag{Name: "persist", Usage: "the lease outlives the boot (the default for libvirt)"},
			&cli.BoolFlag{Name: "formats", Usage: "print the formats, and what cannot be had with each"},
			e.dryRunFlag(), e.jsonFlag(),
		),
		BashComplete: e.completeGuests,
		Action: func(c *cli.Context) (err error) {
			if c.Bool("formats") {
				return e.printFormats()
			}
			if o.Guest, err = oneArgument(c, "the guest's name"); err != nil {
				return err
			}
			if e.json && c.IsSet("format") && o.format != "json" {
				return usagef("assign: --json and --format %s: which of the two?", o.format)
			}
			if e.json = e.json || o.format == "json"; e.json {
				o.format = "json"
			}
			format, known := vmm.Find(o.format)
			if !known && o.format != "json" {
				return usagef("assign: there is no format %q; there are %s", o.format, strings.Join(vmm.Names(), ", "))
			}
			if err := o.parse(c, format); err != nil {
				return err
			}
			o.preview = e.dryRun && c.IsSet("format") && format != nil
			if o.TTL < 0 {
				return usagef("assign: --ttl %s: want no time below zero", o.TTL)
			}
			ends := o.OwnerPID != 0 || o.Unit != ""
			if o.Persist = format != nil && format.Persist && !ends; ends && c.Bool("persist") {
				return usagef("assign: what ends with a process or unit cannot outlive the boot: --persist is for neither --owner-pid nor --unit")
			}
			if c.IsSet("persist") {
				o.Persist = c.Bool("persist")
			}
			return runAssign(c.Context, e, &o, format)
		},
	})
}

func (e *env) printFormats() error {
	rows := [][]string{{"FORMAT", "WHAT CANNOT BE HAD"}, {"json", ""}}
	for _, f := range vmm.Formats {
		rows = append(rows, []string{f.Name, f.Cannot})
	}
	return e.screen.PrintRows(rows)
}

func runAssign(ctx context.Context, e *env, o *assignOptions, format *vmm.Format) error {
	if o.OwnerPID != 0 || o.Unit != "" {
		if err := ownerRuns(e, o); err != nil {
			return err
		}
	}
	return e.assign(ctx, o, func(m *lease.Manager, l *lease.Lease) error {
		if format == nil {
			return writeJSON(e.stdout, viewLease(m, m.LookAt(l)))
		}
		g, err := guestOf(m, l, o)
		if err != nil {
			return err
		}
		text, err := format.Print(g)
		if err != nil {
			return err
		}
		if format.Cannot != "" {
			e.note("%s", format.Cannot)
		}
		if format.Groups && l.Persist {
			e.note("the lease outlives a boot, and the numbers of IOMMU groups in this may not: print it again after one")
		}
		if more := needsMore(m.Host(), format, o.NodeOwner); more != "" {
			e.note("%s", more)
		}
		_, err = io.WriteString(e.stdout, text)
		return err
	})
}

// ownerRuns refuses a lease that would end at once.
func ownerRuns(e *env, o *assignOptions) error {
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	if o.OwnerPID != 0 && (o.OwnerPID < 0 || !holder.NameProcess(h, o.OwnerPID).Alive(h)) {
		return usagef("assign: --owner-pid %d: there is no such process", o.OwnerPID)
	}
	if o.Unit != "" {
		if !strings.Contains(o.Unit, ".") {
			o.Unit += ".service"
		}
		runs, err := lease.UnitRuns(h, o.Unit)
		if err != nil {
			return err
		}
		if !runs {
			return usagef("assign: --unit %s: it does not run (its control group is empty, or not there)", o.Unit)
		}
	}
	return nil
}

// assign gives a guest devices, and calls then while they are still locked.
func (e *env) assign(ctx context.Context, o *assignOptions, then func(*lease.Manager, *lease.Lease) error) error {
	ctx, stop, m, err := e.beginLeases(ctx, o.timeout, makesLeases)
	if err != nil {
		return err
	}
	defer stop()
	if o.standby != "" || o.movable {
		o.socket(m.Host())
	}
	if e.dryRun {
		steps, l, err := m.PreviewLease(&o.Request)
		if err != nil {
			return err
		}
		if o.preview {
			return then(m, l)
		}
		return e.printPreview(o.Guest, steps)
	}
	l, fresh, notes, err := m.Assign(ctx, &o.Request)
	for _, n := range notes {
		e.note("%s", n)
	}
	if err != nil {
		return err
	}
	if err = then(m, l); err == nil && ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if err != nil && fresh { // nobody was told of it
		_, undone := m.Release(context.WithoutCancel(ctx), l.Guest, 0)
		err = errors.Join(err, undone)
	}
	return err
}

// socket gives a guest's QEMU a socket of viaduct's own, by which it moves. One that is not root's cannot make it, and
// libvirt has its own.
func (o *assignOptions) socket(h *iommu.Host) {
	if format, known := vmm.Find(o.VM.Format); known && format.Args != nil && o.NodeOwner == "" {
		o.VM.Socket = migrate.SocketOf(h, o.Guest)
	}
}

// guestOf is a lease as a VMM is told of it.
// Of a preview, nodes are what they will be by the group.
func guestOf(m *lease.Manager, l *lease.Lease, o *assignOptions) (*vmm.Guest, error) {
	g := &vmm.Guest{Name: l.Guest, Standby: o.standby, Movable: o.movable, Socket: o.VM.Socket}
	for _, of := range l.Devices {
		d, err := m.Topology.Find(of.Address)
		if err != nil {
			return nil, err
		}
		v := vmm.Device{Address: of.Address, Group: groupOr(d, -1), VF: d.PhysFn != nil, NIC: d.Class>>16 == 0x02, MAC: of.Now[sriov.MAC], VLAN: of.Now[sriov.VLAN], QoS: of.Now[sriov.QoS], Proto: of.Now[sriov.Proto]}
		if v.MAC == "00:00:00:00:00:00" {
			v.MAC = ""
		}
		if v.VLAN == "0" {
			v.VLAN = ""
		}
		if v.Nodes, err = vfio.Nodes(m.Host(), d); err != nil {
			return nil, err
		}
		if len(v.Nodes) == 0 && o.preview {
			v.Nodes = []string{fmt.Sprintf("/dev/vfio/%d", v.Group)}
		}
		if len(v.Nodes) == 0 && !l.Foreign {
			return nil, fmt.Errorf("%s: it has no node of VFIO", d.Name)
		}
		g.Devices = append(g.Devices, v)
	}
	if o.standby != "" && g.Devices[0].MAC == "" {
		return nil, usagef("--failover: the first device has no MAC address for both NICs to have")
	}
	return g, nil
}

// groupOr is the number of a device's group, or another where it is in none, as under Xen.
func groupOr(d *iommu.Device, none int) int {
	if d.Group == nil {
		return none
	}
	return *d.Group
}

// previewView is what assign --dry-run --json prints.
type previewView struct {
	Guest  string      `json:"guest"`
	Steps  []string    `json:"steps"`
	Writes []writeView `json:"writes"`
	Notes  []string    `json:"notes"`
}

// printPreview prints what an assignment would do; comments among the steps are for people, and notes in JSON.
func (e *env) printPreview(guest string, steps []bind.Action) error {
	if !e.json {
		for _, s := range steps {
			fmt.Fprintln(e.stdout, s)
		}
		return nil
	}
	v := previewView{Guest: guest, Notes: []string{}}
	var does []bind.Action
	for _, s := range steps {
		if note, comment := strings.CutPrefix(s.Command, "# "); comment {
			v.Notes = append(v.Notes, note)
		} else {
			does = append(does, s)
		}
	}
	v.Steps, v.Writes = viewSteps(does)
	return writeJSON(e.stdout, v)
}
