package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/migrate"
	"viaduct/cmd/internal/terminal"
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
		&cli.StringSliceFlag{
			Name: "from",
			Usage: "draw from this pool of host.yaml, PF, or any `SELECTOR`[,count=N][,KEY=VALUE]..., where the keys " +
				"are those of --set; may be repeated",
		},
		&cli.IntFlag{
			Name:        "count",
			Usage:       "number of VFs, or of groups of other devices",
			Value:       1,
			Destination: &o.count,
		},
		&cli.StringFlag{
			Name:        "mac",
			Usage:       "VF MAC `ADDRESS`, or stable to derive one from the PF's address and the VF index",
			Destination: &o.mac,
		},
		&cli.StringFlag{
			Name:        "vlan",
			Usage:       "VLAN `ID` (0-4094, or e.g. 100+index) that the PF applies to the VF's frames",
			Destination: &o.vlan,
		},
		&cli.StringSliceFlag{
			Name:  "set",
			Usage: "make another setting `KEY=VALUE` of the VF, as viaduct vf set takes it (may be repeated)",
		},
		&cli.StringFlag{
			Name:        "memory",
			Usage:       "guest memory `SIZE` (e.g. 8G): check that the IOMMU can map it and the VMM may lock it",
			Destination: &o.memory,
		},
		&cli.IntFlag{Name: "numa", Usage: "prefer devices of this NUMA `NODE`", Value: -1},
		&cli.StringFlag{
			Name:        "node-owner",
			Usage:       "let `USER[:GROUP]` own the devices' nodes",
			Destination: &o.NodeOwner,
		},
		&cli.BoolFlag{
			Name: "no-reset",
			Usage: "assign a device even if nothing can reset it: the next guest finds what this one leaves in " +
				"it",
			Destination: &o.NoReset,
		},
		&cli.StringFlag{
			Name: "failover",
			Usage: "for migration: add a virtio NIC on `BRIDGE` that has the first VF's MAC address and " +
				"replaces it",
			Destination: &o.standby,
		},
		&cli.BoolFlag{
			Name:        "movable",
			Usage:       "for migration without a virtio NIC: let the first device be unplugged",
			Destination: &o.movable,
		},
		&cli.DurationFlag{
			Name:        "timeout",
			Usage:       "wait this long for one write, and for another viaduct",
			Value:       bind.DefaultTimeout,
			Destination: &o.timeout,
		},
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
		return usagef("%s: invalid --memory %q: want a size, e.g. 512M or 8G", c.Command.Name, o.memory)
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
		return usagef("%s: --failover needs the format qemu, qemu-iommufd or libvirt", c.Command.Name)
	}
	if _, known := o.Sources[0].Settings[sriov.MAC]; o.standby != "" && !known {
		return usagef("%s: --failover needs --mac, because both NICs have the same address", c.Command.Name)
	}
	if o.movable && (format == nil || !format.Standby || format.Args == nil) {
		return usagef("%s: --movable is for the formats qemu and qemu-iommufd", c.Command.Name)
	}

	o.VM = &vmm.Machine{Format: o.format, Memory: o.Memory, Standby: o.standby}
	o.AvoidsReservedRange, o.OwnDriver = format != nil && format.AvoidsReservedRange, format != nil && format.OwnDriver
	return checkTimeout(o.timeout)
}

// parseSources reads what is drawn, each with the settings of its VFs; what one does not say, the other flags say.
func (o *assignOptions) parseSources(c *cli.Context) error {
	all := c.StringSlice("from")
	if len(all) == 0 {
		return usagef("%s: --from is missing: name a pool, a PF or a device", c.Command.Name)
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
		if mac := s.Settings[sriov.MAC].String(); mac != "" && mac != sriov.StableMAC {
			macs[mac] += s.Count
		}
		o.Sources = append(o.Sources, s)
	}
	for mac, n := range macs {
		if n > 1 {
			return usagef("%s: MAC address %s is one address for %d VFs: use stable", c.Command.Name, mac,
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
			return s, fmt.Errorf("invalid count %q", value)
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
		s.Settings, err = hostfile.ParseValues(settings)
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
		return s, errors.New("msix cannot be set for a guest: set it with viaduct vf set or in host.yaml first")
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
	// A plain number is MiB, as in QEMU's -m.
	unit := map[string]uint{"": 20, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
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
		Usage:     "assign devices to a guest, and print what its VMM needs",
		ArgsUsage: "GUEST --from POOL|PF|SELECTOR...",
		Description: "viaduct chooses devices that nobody has, configures and takes them, and records whose they " +
			"are: a lease, which `viaduct release` ends. A second call for the same guest prints the same lease. Any " +
			"number of calls may run at once.\n\n" +
			"A lease is reserved until a process opens its devices, and then active. It is dead when that " +
			"process is gone or nobody came within `--ttl`; `viaduct release --dead` ends it then.\n\n" +
			"The formats are " + strings.Join(vmm.Names(), ", ") + ".\n\n" +
			"Examples:\n  viaduct assign web --from net --vlan 100 --mac stable\n" +
			"  viaduct assign web --from enp1s0 --format libvirt\n" +
			"  viaduct assign web --from front,vlan=100,mac=stable --from back,count=2\n" +
			"  viaduct assign web --from net,count=4,vlan=100+index\n" +
			"  qemu-system-x86_64 ... $(viaduct assign web --from net --owner-pid $$)\n" +
			"  viaduct assign db --from 0000:03:00.0 --memory 64G --format json",
		Flags: append(append(o.flags(),
			&cli.StringFlag{
				Name:        "format",
				Usage:       "print in this format: `qemu|json|...` (see --formats)",
				Value:       "qemu",
				Destination: &o.format,
			},
			&cli.DurationFlag{
				Name:        "ttl",
				Usage:       "end the lease if no process opens the devices in this time; 0 for no limit",
				Value:       10 * time.Minute,
				Destination: &o.TTL,
			},
			&cli.IntFlag{Name: "owner-pid", Usage: "end the lease with the process `PID`", Destination: &o.OwnerPID},
			&cli.StringFlag{
				Name:        "unit",
				Usage:       "end the lease with this system `UNIT` of systemd (not a user's)",
				Destination: &o.Unit,
			},
			&cli.BoolFlag{Name: "persist", Usage: "keep the lease over a boot (the default for libvirt)"},
			&cli.BoolFlag{Name: "formats", Usage: "list the formats, and what each cannot do"},
			e.jsonFlag(),
		), e.dryRunFlags()...),
		BashComplete: e.completeGuests,
		Action: func(c *cli.Context) (err error) {
			if c.Bool("formats") {
				e.printFormats()
				return nil
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
				return usagef("assign: unknown format %q; the formats are %s", o.format,
					strings.Join(vmm.Names(), ", "))
			}
			if err := o.parse(c, format); err != nil {
				return err
			}
			o.preview = e.dryRun && !e.steps && c.IsSet("format") && format != nil
			if o.TTL < 0 {
				return usagef("assign: invalid --ttl %s: want zero or more", o.TTL)
			}
			ends := o.OwnerPID != 0 || o.Unit != ""
			if o.Persist = format != nil && format.Persist && !ends; ends && c.Bool("persist") {
				return usagef("assign: --persist cannot be combined with --owner-pid or --unit: such a lease ends " +
					"before the boot does")
			}
			if c.IsSet("persist") {
				o.Persist = c.Bool("persist")
			}
			return runAssign(c.Context, e, &o, format)
		},
	})
}

func (e *env) printFormats() {
	rows := [][]string{{"FORMAT", "CANNOT DO"}, {"json", ""}}
	for _, f := range vmm.Formats {
		rows = append(rows, []string{f.Name, f.Cannot})
	}
	e.printRows(rows)
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
			e.note("the lease outlives a boot, and the numbers of IOMMU groups in this may not: print it again after " +
				"one")
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
		return usagef("assign: --owner-pid %d: no such process", o.OwnerPID)
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
			return usagef("assign: --unit %s: the unit does not run (its control group is empty or missing)", o.Unit)
		}
	}
	return nil
}

// assign gives a guest devices, and calls then while they are still locked.
func (e *env) assign(ctx context.Context, o *assignOptions, then func(*lease.Manager, *lease.Lease) error) error {
	ctx, stop, m, err := e.beginLeases(ctx, o.timeout, lease.Makes)
	if err != nil {
		return err
	}
	defer stop()
	if o.standby != "" || o.movable {
		o.socket(m.Host())
	}

	if e.dryRun {
		p, err := m.Preview(&o.Request)
		if err != nil {
			return err
		}
		if o.preview {
			return then(m, p.Lease)
		}
		if e.json {
			e.printPreview(o.Guest, p.Steps())
		} else {
			e.preview(previewAssign(o.Guest, p))
		}
		return nil
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
		v := vmm.Device{Address: of.Address, Group: groupOr(d, -1), VF: d.PhysFn != nil, NIC: d.Class>>16 == 0x02,
			MAC: of.Now[sriov.MAC], VLAN: of.Now[sriov.VLAN], QoS: of.Now[sriov.QoS], Proto: of.Now[sriov.Proto]}
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
		if len(v.Nodes) == 0 && !l.OwnDriver {
			return nil, fmt.Errorf("%s has no VFIO node", d.Name)
		}
		g.Devices = append(g.Devices, v)
	}
	if o.standby != "" && g.Devices[0].MAC == "" {
		return nil, usagef("--failover: the first device has no MAC address")
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

// printPreview prints what an assignment would do as JSON, where the comments among the steps are notes.
func (e *env) printPreview(guest string, steps []bind.Action) {
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
	e.printJSON(v)
}

// previewAssign is what a guest would get: its VFs by their PF, then its other devices.
func previewAssign(guest string, a *lease.Preview) *preview {
	p := &preview{}
	verb := guest + " gets "
	if a.Again {
		verb = guest + " has "
	}
	pfs := map[iommu.Address][]lease.PreviewDevice{}
	var order []iommu.Address
	var keeps []*iommu.Device
	for _, of := range a.Devices {
		switch d := of.Device; {
		case d.PhysFn != nil:
			if pfs[*d.PhysFn] == nil {
				order = append(order, *d.PhysFn)
			}
			pfs[*d.PhysFn] = append(pfs[*d.PhysFn], of)
		case of.Companion():
			keeps = append(keeps, d)
		default:
			p.of(verb + d.Name)
			p.says(assignText(&of))
		}
	}

	for _, pf := range order {
		p.vfsOf(verb, pf, pfs[pf])
	}
	p.says(declared.Along("takes", keeps)...)

	for _, s := range a.Steps() {
		if note, comment := strings.CutPrefix(s.Command, "# "); comment {
			p.comment(note)
		} else {
			p.does(bind.Commands([]bind.Action{s})...)
		}
	}
	return p
}

// vfsOf is what a guest would get of a PF's VFs: the settings, and what is the same of many once.
func (p *preview) vfsOf(verb string, pf iommu.Address, vfs []lease.PreviewDevice) {
	var all []int
	var sets []*sriov.SetPlan
	same := map[string][]int{}
	for _, of := range vfs {
		index := of.Device.VFIndex
		all = append(all, index)
		same[assignText(&of)] = append(same[assignText(&of)], index)
		if of.Set != nil {
			sets = append(sets, of.Set)
		}
	}
	p.of(verb + terminal.Fold("vf", all) + " of " + pf.String())
	p.says(declared.SetWords(sets, func(int) sriov.Settings { return nil })...)
	for _, text := range slices.Sorted(maps.Keys(same)) {
		p.says(terminal.Fold("vf", same[text]) + ": " + text)
	}
}

// assignText is where a device of a guest's goes, and how it is reset for the guest.
func assignText(of *lease.PreviewDevice) string {
	if of.Change == nil {
		return "left on " + driverText(known(of.Device.Driver)) + ", for the VMM to take it"
	}
	text := moveText(of.Change)
	if of.Reset != nil {
		text += ", then reset " + of.Reset.String()
	}
	return text
}
