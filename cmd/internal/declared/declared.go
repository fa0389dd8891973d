// Package declared makes a host what is declared of it: it finds what the declaration names, plans what is different,
// has the engines of vfio and sriov do that, and puts a PF back as it was if it could not be brought all the way.
package declared

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// StateDir is where is kept what must outlive a boot, below the host's root.
const StateDir = "var/lib/viaduct"

// Options are how a host is brought to what is declared of it.
type Options struct {
	Force  []holder.Kind // holders to override
	Boot   bool          // nobody can hold anything yet: what was protected when the host ran is refused
	Accept bool          // what changed since is as it is to be
	Late   bool          // also what waits for a bond

	// Leased tells what guests' devices have instead of what is declared; the drivers of all that is in it are left
	// alone. It is asked anew for each plan. nil: there are no guests.
	Leased func() (map[iommu.Address]Guest, error)
}

// Guest is what a guest's device has instead of what is declared.
type Guest struct {
	Settings sriov.Settings // of a VF
	// OwnDriver: its VMM has it on a driver of its own, as Xen's pciback, and no VFIO driver is to take it.
	OwnDriver bool
}

// Manager is what the declared host is planned and applied with. It changes nothing that its Handle has not locked.
type Manager struct {
	handle   *sriov.Handle
	host     *iommu.Host
	topology *iommu.Topology
	options  Options
	run      *journal.Journal // what dies with the boot
	state    *journal.Journal // in StateDir

	exact bool // VFs that are to have no driver must not be on a vfio driver either
}

// New makes a Manager, which works on the host as the Handle last saw it.
func New(s *sriov.Handle, o Options) (*Manager, error) {
	t, err := s.Topology()
	if err != nil {
		return nil, err
	}
	m := Of(s.Host())
	m.handle, m.topology, m.options = s, t, o
	return m, nil
}

// Of is a Manager for what needs no look at the host's devices: what waits to be confirmed, and what is left alone on
// purpose.
func Of(h *iommu.Host) *Manager {
	return &Manager{host: h, run: journal.In(h.Host, journal.Dir), state: journal.In(h.Host, StateDir)}
}

// State is how a declared device is, in one word.
type State string

// The states.
const (
	OK      State = "ok"      // as declared
	Differs State = "differs" // steps lead to what is declared
	Missing State = "missing" // not there
	Changed State = "changed" // what is there is not what was there: not touched until that is accepted
	Refused State = "refused" // it must not be brought there, or cannot
	Unknown State = "unknown" // a captured host does not tell what would have to be compared

	Unmanaged State = "unmanaged" // not declared, and has VFs or is on a vfio driver
)

// Item is one declared PF or device, how it is, and what it takes.
type Item struct {
	Name     string
	At       hostfile.Pos
	Optional bool
	Device   *iommu.Device // nil if it is missing
	State    State
	Err      error // why it is in this state, if it is not OK or Differs
	Steps    []bind.Action
	Notes    []string // what the user should know
	Waits    bool     // what it takes is done when the bond is there

	count   *sriov.Plan
	sets    []*sriov.SetPlan
	take    map[string][]*iommu.Device // by driver
	none    []*iommu.Device
	home    []*iommu.Device
	unit    []*iommu.Device // of a device, its group
	with    *Item           // of a device whose group another item declares too: that, which is planned and done
	driver  string          // to take it with
	owner   *bind.NodeOwner
	known   *known
	pf      *hostfile.PF // that is declared
	homes   []int        // indexes of the VFs that are the host's
	marks   []mark       // of VFs whose interfaces are to be left alone, or no more
	unknown []string     // what is declared, and could not be compared
}

// Wrong reports whether the item is not as declared. That one is missing which may be is not wrong.
func (i *Item) Wrong() bool { return i.State != OK && (i.State != Missing || !i.Optional) }

// Devices are all that a change of the item touches.
func (i *Item) Devices() []*iommu.Device {
	var out []*iommu.Device
	if i.Device != nil {
		out = append(out, i.Device)
	}
	if i.count != nil {
		out = append(out, i.count.Victims...)
	}
	for _, s := range i.sets {
		out = append(out, s.VF)
	}
	for _, vfs := range i.take {
		out = append(out, vfs...)
	}
	return append(append(append(out, i.none...), i.home...), i.unit...)
}

// Plan compares what is declared with the host.
func (m *Manager) Plan(s *hostfile.Host) ([]*Item, error) {
	guard, err := m.guard(s)
	if err != nil {
		return nil, err
	}
	var items []*Item
	seen := map[string]*Item{}
	add := func(i *Item) {
		touched := i.unit
		if i.unit == nil && i.Device != nil {
			touched = []*iommu.Device{i.Device}
		}
		if i.State == Refused {
			// Which has a reason.
			touched = nil
		}
		for _, d := range touched {
			if first := seen[d.Name]; first != nil && first != i.with {
				i.Refuse(fmt.Errorf("%s: %s takes %s, which is already declared at %s", i.At, i.Name, d.Name, first.At))
				break
			}
			if d.PhysFn == nil {
				continue
			}
			if of := seen[d.PhysFn.String()]; of != nil && of.pf != nil {
				i.Refuse(
					fmt.Errorf("%s: %s is a VF of %s, which is declared in pfs: declare the VF there", i.At,
						d.Name, d.PhysFn),
				)
				break
			}
		}

		for _, d := range touched {
			if seen[d.Name] == nil {
				seen[d.Name] = i
			}
		}

		items = append(items, i)
	}

	leased, err := m.Guests()
	if err != nil {
		return nil, err
	}
	pfs, err := m.pfs(s)
	if err != nil {
		return nil, err
	}
	for k := range pfs {
		add(m.planPF(&pfs[k], guard, leased))
	}
	for _, i := range m.planDevices(s.Devices, guard, leased) {
		add(i)
	}
	return items, nil
}

// Refuse leaves the item alone, for a reason.
func (i *Item) Refuse(err error) { i.State, i.Err, i.Steps = Refused, err, nil }

// found looks for the item's device, where any can stand or only a PF. One that the match does not name any more, as
// its interface has another name or a VFIO driver has it, is found by what was written down when it was last applied.
func (m *Manager) found(i *Item, match hostfile.Match, find func(hostfile.Match) (*iommu.Device, error)) bool {
	var err error
	if i.known, err = m.remembered(match); err != nil {
		i.Refuse(err)
		return false
	}

	d, err := find(match)
	if errors.Is(err, iommu.ErrNotFound) && i.known != nil {
		recorded, look := m.byRecord(i.known)
		if look != nil {
			i.Refuse(look)
			return false
		}
		if recorded != nil {
			d, err = recorded, nil
			i.Notes = append(i.Notes, fmt.Sprintf("%s: nothing matches %s now; it is %s by the record of "+
				"the last apply", i.At, match.String(), d.Name))
		}
	}
	if err != nil {
		if i.State, i.Err = Refused, err; errors.Is(err, iommu.ErrNotFound) {
			i.State = Missing
		}
		return false
	}
	i.Device = d

	why, err := m.changed(i.known, match, d)
	if err != nil {
		i.Refuse(err)
		return false
	}
	if why != "" && !m.options.Accept {
		i.State, i.Err = Changed, fmt.Errorf("%s: %s (viaduct apply --accept accepts that)", i.Name, why)
		return false
	}

	if !match.Has(iommu.ByMAC, iommu.ByGUID, iommu.ByPath, iommu.BySerial) {
		i.Notes = append(
			i.Notes,
			fmt.Sprintf("%s: %s may name another device at the next boot; path=, serial= or mac= do not", i.At,
				match.String()),
		)
	}
	return true
}

func (m *Manager) planPF(pf *hostfile.PF, guard *guard, leased map[iommu.Address]Guest) *Item {
	i := &Item{Name: pf.Select.String(), At: pf.At, Optional: pf.Optional, State: OK, pf: pf}
	if !m.found(i, pf.Select, m.findPF) {
		return i
	}
	if err := guard.declared(i.Device); err != nil {
		i.Refuse(err)
		return i
	}

	i.Waits = pf.AfterBond && !m.options.Late && !m.bonded(i.Device)
	wish, err := m.wish(pf, i.Device, i.Waits, leased)
	if err != nil {
		i.Refuse(err)
		return i
	}
	i.homes = homes(wish.VFs)
	plan, err := m.handle.PlanCount(i.Device, wish)
	if err != nil {
		i.Refuse(err)
		return i
	}

	if m.options.Boot && guard.names[i.Device.Name] != "" {
		// What carries the host gets its addresses as if it were brought up for that.
		for n := range plan.Up {
			plan.Up[n].GenMode = nil
		}
	}

	i.unknown = plan.Unknown
	if plan.Changes() {
		i.count = plan
		i.Steps = append(i.Steps, plan.Steps()...)
		i.Notes = append(i.Notes, plan.Notes...)
	}

	if err := m.planUnmanaged(i); err != nil {
		i.Refuse(err)
		return i
	}
	if plan.Have == plan.Want && plan.Eswitch.Mode == "" {
		if n := len(i.Device.SRIOV.VFs); n > 0 && i.Device.SRIOV.VFs[n-1].Index != n-1 {
			i.Refuse(
				fmt.Errorf("%s: some of its VFs are missing, e.g. because they are being made or removed",
					i.Device.Name),
			)
			return i
		}
		if err := m.planVFs(i, wish.VFs, leased); err != nil {
			i.Refuse(err)
			return i
		}
	}

	i.compared()
	return i
}

// compared says how a PF is whose steps are planned. What could not be compared may differ too.
func (i *Item) compared() {
	why := fmt.Sprintf("%s was not captured of this host, so that it is not known whether it is as declared",
		strings.Join(i.unknown, " and "))
	switch {
	case len(i.Steps) > 0 && len(i.unknown) > 0:
		i.State, i.Notes = Differs, append(i.Notes, why)
	case len(i.Steps) > 0:
		i.State = Differs
	case len(i.unknown) > 0:
		i.State, i.Err = Unknown, errors.New(why)
	}
}

// wish is what a PF is declared to have, but for what guests' VFs have instead.
func (m *Manager) wish(pf *hostfile.PF, d *iommu.Device, waits bool,
	leased map[iommu.Address]Guest) (sriov.Wish, error) {
	wish := sriov.Wish{
		Eswitch: sriov.Eswitch{Mode: pf.Eswitch, Inline: pf.Inline, Encap: pf.Encap}, Offload: pf.Offload, MTU: pf.MTU,
	}

	var places []iommu.Address
	if len(leased) > 0 {
		var err error
		if places, err = iommu.VFAddresses(m.host, d.Address); err != nil {
			return wish, err
		}
	}

	for n, vf := range pf.Each() {
		use := vf.Use
		if waits {
			use = sriov.UseNone
		}
		if n < len(places) {
			if own, ours := leased[places[n]]; ours {
				if use = sriov.UseVFIO; own.OwnDriver {
					use = sriov.UseNone
				}
				if m.exact {
					// What it had before is no business of the guest's.
					clear(vf.Settings)
				}
				maps.Copy(vf.Settings, own.Settings)
			}
		}
		wish.VFs = append(wish.VFs, sriov.VFWish{Use: use, Settings: vf.Settings})
	}

	return wish, nil
}

// Guests are what Leased tells now.
func (m *Manager) Guests() (map[iommu.Address]Guest, error) {
	if m.options.Leased == nil {
		return nil, nil
	}
	return m.options.Leased()
}

// bonded reports whether a PF's interface is in a bond or the like.
func (m *Manager) bonded(d *iommu.Device) bool {
	return slices.ContainsFunc(d.Netdevs,
		func(n string) bool { return m.host.Exists("sys/class/net/" + n + "/master") })
}

// planVFs is what VFs that are there lack.
func (m *Manager) planVFs(i *Item, wish []sriov.VFWish, leased map[iommu.Address]Guest) error {
	vfs := m.topology.VFs(i.Device)
	if len(vfs) != len(i.Device.SRIOV.VFs) {
		return fmt.Errorf("%s: VFs of it were made or removed just now", i.Device.Name)
	}
	i.dropped(vfs, wish, leased)
	var err error
	i.sets, err = m.handle.PlanSets(i.Device, vfs, wish)
	if errors.Is(err, sriov.ErrNotCaptured) {
		i.unknown = append(i.unknown, "what its VFs are set to")
	} else if err != nil {
		return err
	}

	for _, s := range i.sets {
		i.Steps = append(i.Steps, s.Steps()...)
	}
	none := &NoDriverError{}
	i.take = map[string][]*iommu.Device{}
	for _, vf := range vfs {
		if with := m.topology.KeptWith(vf); with != nil && wish[vf.VFIndex].Use.Driver() != "" {
			i.Notes = append(i.Notes, Kept(vf, with))
		}
		var change bind.Change
		var err error
		use := wish[vf.VFIndex].Use
		switch driver := use.Driver(); {
		case leased[vf.Address].OwnDriver:
		case driver != "" && (!vf.VFIO || driver != bind.Auto && driver != vf.Driver):
			i.take[driver] = append(i.take[driver], vf)
			change, err = m.handle.Plan(vf, bind.Take(driver))
		case i.Waits && vf.Driver != "":
			// Which the bond that was there let it have.
		case use == sriov.UseNone && (vf.Blocks() || m.exact && vf.Driver != ""):
			// With vfio, a guest may have been given it.
			i.none = append(i.none, vf)
			change, err = m.handle.Plan(vf, bind.Take(bind.None))
		case use == sriov.UseHome && !vf.Blocks():
			change, err = m.handle.Plan(vf, bind.Home())
			if err == nil && homeless(vf, &change) {
				none.VFs, change.Steps = append(none.VFs, vf.Name), nil
			} else {
				i.home = append(i.home, vf)
			}
		}

		if err != nil {
			return err
		}
		i.Steps = append(i.Steps, bind.Actions(change.Steps)...)
	}
	if len(none.VFs) > 0 && len(i.Steps) == 0 {
		return none
	}
	return nil
}

// Check asks, before the first write, who uses what a change would end. Items that are refused say why.
func (m *Manager) Check(items []*Item) {
	for _, i := range items {
		if i.State != Differs || i.with != nil {
			continue
		}
		if err := m.check(i); err != nil {
			i.Refuse(err)
		}
	}
	follow(items)
}

func (m *Manager) check(i *Item) error {
	if i.count != nil {
		if err := m.handle.CheckCount(i.count, m.options.Force); err != nil {
			return err
		}
	}
	if err := m.checkSets(i); err != nil {
		return err
	}

	// A guest's VF goes where the guest needs it.
	guests := append(slices.Clone(m.options.Force), holder.Lease)
	type step struct {
		devices []*iommu.Device
		goal    bind.Goal
		units   [][]*iommu.Device
		force   []holder.Kind
	}
	var steps []step
	for driver, vfs := range i.take {
		steps = append(steps, step{vfs, bind.Take(driver), bind.Singly(vfs), guests})
	}
	for _, s := range append(steps, []step{
		{i.none, bind.Take(bind.None), bind.Singly(i.none), m.options.Force},
		{i.home, bind.Home(), bind.Singly(i.home), m.options.Force},
		{i.unit, bind.Take(i.driver), [][]*iommu.Device{i.unit}, m.options.Force},
	}...) {
		if len(s.devices) == 0 {
			continue
		}
		verdicts, err := m.handle.Check(s.units, s.devices, s.goal, s.force)
		for _, v := range verdicts {
			i.Notes = append(i.Notes, v.Notes...)
		}
		if err = errors.Join(err, bind.Refusals(verdicts)); err != nil {
			return err
		}
	}
	return nil
}

// checkSets refuses other settings for VFs that are in use, unless that is forced, and tells of it then. What a PF's
// reset took from a guest's VF, as its VLAN, must come back: there is no reason against that.
func (m *Manager) checkSets(i *Item) error {
	if len(i.sets) == 0 {
		return nil
	}
	asked, err := m.handle.LastRequested(i.Device)
	if err != nil {
		return err
	}
	var other, all []*iommu.Device
	for _, s := range i.sets {
		all = append(all, s.VF)
		if !s.Restores(asked[s.VF.VFIndex]) {
			other = append(other, s.VF)
		}
	}

	holders, err := holder.Find(m.host, all)
	if err != nil && !errors.Is(err, holder.ErrBlind) {
		// Who cannot see all is told of those that can be seen.
		return err
	}
	holders = slices.DeleteFunc(holders, func(h holder.Holder) bool { return !h.Kind.InUse() })
	hit := slices.DeleteFunc(slices.Clone(holders), func(h holder.Holder) bool {
		return !slices.ContainsFunc(other, func(d *iommu.Device) bool { return d.Name == h.Device })
	})
	what := "change the settings of VFs of " + i.Device.Name
	if err := holder.Refuse(what, hit, m.options.Force, "end their users first"); err != nil {
		return err
	}

	for _, h := range holders {
		i.Notes = append(i.Notes, "its settings would change while "+h.String())
	}
	return nil
}

// Unmanaged are the devices that are as a declaration would have them, and that nothing declares.
func (m *Manager) Unmanaged(items []*Item) []*iommu.Device {
	ours := map[string]bool{}
	for _, i := range items {
		for _, d := range i.Devices() {
			ours[d.Name] = true
		}
	}
	var out []*iommu.Device
	m.topology.All(func(d *iommu.Device) bool {
		if d.PCI && d.PhysFn == nil && !ours[d.Name] && (d.SRIOV != nil && len(d.SRIOV.VFs) > 0 || d.VFIO) {
			out = append(out, d)
		}
		return true
	})
	return out
}

// Settings are what is declared of the settings of a PF's VFs, by index; false if the PF is not declared.
func (m *Manager) Settings(s *hostfile.Host, d *iommu.Device) (map[int]sriov.Settings, bool) {
	pfs, err := m.pfs(s)
	if err != nil {
		return nil, false
	}
	for k := range pfs {
		if found, err := m.findPF(pfs[k].Select); err != nil || found.Name != d.Name {
			continue
		}
		return settingsOf(&pfs[k]), true
	}
	return nil, false
}

func settingsOf(pf *hostfile.PF) map[int]sriov.Settings {
	out := map[int]sriov.Settings{}
	for i, vf := range pf.Each() {
		if len(vf.Settings) > 0 {
			out[i] = vf.Settings
		}
	}
	return out
}

// Host is the host that is brought to what is declared of it.
func (m *Manager) Host() *iommu.Host { return m.host }
