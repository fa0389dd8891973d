package iommu

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"

	"viaduct/internal/host"
	"viaduct/internal/journal"
)

// Topology is a host's devices, their IOMMU groups, and the IOMMU units, as they were during one [Scan].
type Topology struct {
	Units              []Unit
	InterruptRemapping *bool   // nil if it cannot be told
	Groups             []Group // by ID; the numbers have gaps
	Ungrouped          []Device

	lookup *lookup
}

// lookup finds devices of a topology that was scanned. It is made when it is first needed: who only lists needs none.
type lookup struct {
	once sync.Once
	by   map[Address]*Device

	mu    sync.Mutex
	keyed map[Form]*keyed
}

// Group is an IOMMU group: the smallest set of devices that the IOMMU can tell from all others.
type Group struct {
	ID int
	// Type is that of the default domain: DMA, DMA-FQ, identity, blocked, unmanaged, unknown; "" where the kernel has
	// no such file.
	Type    string
	Devices []Device
	// NoIOMMU is set of a group that VFIO made in its noiommu mode: nothing keeps its devices from any memory.
	NoIOMMU bool
}

// Blockers are the devices that keep the group from being viable; none if a guest can have it as it is.
func (g *Group) Blockers() []*Device {
	var out []*Device
	for i := range g.Devices {
		if g.Devices[i].Blocks() {
			out = append(out, &g.Devices[i])
		}
	}
	return out
}

// Endpoints are what is taken and given back together: all members but the bridges, and what is behind another member's
// driver.
func (g *Group) Endpoints() []*Device { return g.in(RoleGuest, RoleCompanion) }

// Handed are the members that a guest gets.
func (g *Group) Handed() []*Device { return g.in(RoleGuest) }

// Children are the members behind the driver of another one, with which they go.
func (g *Group) Children() []*Device { return g.in(RoleChild) }

func (g *Group) in(roles ...Role) []*Device {
	var out []*Device
	for i := range g.Devices {
		if slices.Contains(roles, g.Devices[i].Role()) {
			out = append(out, &g.Devices[i])
		}
	}
	return out
}

// Group returns a group by its number.
func (t *Topology) Group(id int) (*Group, error) {
	i, ok := slices.BinarySearchFunc(t.Groups, id, func(g Group, id int) int { return g.ID - id })
	if !ok {
		return nil, fmt.Errorf("IOMMU group %d: %w", id, ErrNotFound)
	}
	return &t.Groups[i], nil
}

// GroupOf is the group that a device of the topology is in, nil if it is in none.
func (t *Topology) GroupOf(d *Device) *Group {
	if d.Group == nil {
		return nil
	}
	g, err := t.Group(*d.Group)
	if err != nil {
		return nil
	}
	return g
}

// All calls f for every device, grouped or not, until it returns false.
func (t *Topology) All(f func(*Device) bool) {
	for i := range t.Groups {
		for j := range t.Groups[i].Devices {
			if !f(&t.Groups[i].Devices[j]) {
				return
			}
		}
	}
	for i := range t.Ungrouped {
		if !f(&t.Ungrouped[i]) {
			return
		}
	}
}

// Find returns a PCI device by its address.
func (t *Topology) Find(a Address) (*Device, error) {
	l := t.lookup
	if l == nil {
		// Made by hand.
		l = &lookup{}
	}
	l.once.Do(func() {
		l.by = map[Address]*Device{}
		t.All(func(d *Device) bool {
			if d.PCI {
				l.by[d.Address] = d
			}
			return true
		})
	})
	if d := l.by[a]; d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("%s: %w", a, ErrNotFound)
}

// VFs are a PF's VFs, by index; those that were made or removed during the scan may be missing. None of a device that
// is no PF.
func (t *Topology) VFs(pf *Device) []*Device {
	if pf.SRIOV == nil {
		return nil
	}
	var out []*Device
	for _, v := range pf.SRIOV.VFs {
		if vf, err := t.Find(v.Address); err == nil {
			out = append(out, vf)
		}
	}
	return out
}

// PFOf is the PF of a VF of the topology, nil of what is no VF.
func (t *Topology) PFOf(vf *Device) *Device {
	if vf.PhysFn == nil {
		return nil
	}
	pf, err := t.Find(*vf.PhysFn)
	if err != nil {
		return nil
	}
	return pf
}

// KeptWith is what the host keeps of a VF's IOMMU group, so that no guest can have the VF: its PF, or another device on
// a driver of the host. It is nil if there is nothing of that.
func (t *Topology) KeptWith(vf *Device) *Device {
	g := t.GroupOf(vf)
	if g == nil || vf.PhysFn == nil {
		return nil
	}
	for _, other := range g.Handed() {
		its := other.PCI && other.Address == *vf.PhysFn
		if other.Name != vf.Name && (its || other.Blocks()) {
			return other
		}
	}
	return nil
}

// Scan reads all PCI devices and IOMMU groups in one pass. A device that vanishes meanwhile is left out.
func Scan(h *Host) (*Topology, error) {
	if h == nil || h.Host == nil {
		return nil, errors.New("iommu: no host given (Open returns one)")
	}
	names, err := h.Names(pciDevices)
	if errors.Is(err, fs.ErrNotExist) && !h.Exists("sys/kernel") {
		return nil, fmt.Errorf("%w (is sysfs mounted?)", err)
	}
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	return scan(h, names, func() ([]string, error) { return h.Names(groupsDir) })
}

// scan reads these PCI devices and IOMMU groups. A group has those of its devices alone that are among them.
func scan(h *Host, names []string, groups func() ([]string, error)) (*Topology, error) {
	if err := checkCaptured(h, names); err != nil {
		return nil, err
	}
	busy, err := changing(h)
	if err != nil {
		return nil, err
	}

	devices, err := readAll(h, pciDevices, names, func(dir *host.Dir, name string) (Device, error) {
		return readDevice(dir, name, !busy[name])
	})
	if err != nil {
		return nil, err
	}
	if !slices.IsSortedFunc(devices, CompareDevices) {
		// As with domains of different length.
		slices.SortFunc(devices, CompareDevices)
	}
	t := &Topology{lookup: &lookup{}}
	if t.Units, err = readUnits(h); err != nil {
		return nil, err
	}

	// Each goes over many small files.
	var raw []rawGroup
	if err := sideBySide(len(devices), func() (err error) {
		raw, err = readRawGroups(h, groups)
		return err
	}, func() (err error) {
		if t.InterruptRemapping, err = readInterruptRemapping(h); err != nil {
			return err
		}
		return readNetdevs(h, devices)
	}); err != nil {
		return nil, err
	}

	linkVFs(devices)
	if err := readParents(h, devices); err != nil {
		return nil, err
	}
	if t.Groups, err = sortInto(h, raw, devices); err == nil {
		err = cardsOwn(h, t.Groups)
	}
	if err != nil {
		return nil, err
	}

	for i := range devices {
		if devices[i].Group == nil {
			t.Ungrouped = append(t.Ungrouped, devices[i])
		}
	}
	return t, nil
}

// changing are the devices with a record of a change that is under way, and the VFs that they have or may have had.
// Reading driver_override would wait for a write that is stuck: the kernel takes the device's lock for both
// (drivers/base/dd.c; driver_override_show of older kernels), of a PF and, while its VFs are removed, of a VF that no
// link leads to any more.
func changing(h *Host) (map[string]bool, error) {
	names, err := h.Names(journal.Dir)
	if host.Absent(err) || errors.Is(err, fs.ErrPermission) {
		return nil, nil
	}

	busy := map[string]bool{}
	for _, n := range names {
		if key, ok := strings.CutPrefix(n, journal.Changing); ok {
			name := strings.TrimSuffix(key, ".json")
			busy[name] = true
			pf, err := ParseAddress(name)
			if err != nil {
				continue
			}
			vfs, err := VFAddresses(h, pf)
			if err != nil {
				return nil, err
			}
			for _, vf := range vfs {
				busy[vf.String()] = true
			}
		}
	}
	return busy, err
}

// VFAddresses returns the addresses at which a PF's VFs are, by index, when it has all it can have; none for any other
// device.
func VFAddresses(h *Host, pf Address) ([]Address, error) {
	dir := path.Join(pciDevices, pf.String())
	total, err1 := h.SteadyInt(path.Join(dir, "sriov_totalvfs"))
	offset, err2 := h.SteadyInt(path.Join(dir, "sriov_offset"))
	stride, err3 := h.SteadyInt(path.Join(dir, "sriov_stride"))
	for _, err := range []error{err1, err2, err3} {
		if host.Absent(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}

	var out []Address
	for i := range min(total, 1<<16) {
		at := int(pf.Bus)<<8 + int(pf.Device)<<3 + int(pf.Function) + offset + i*stride
		out = append(out,
			Address{Domain: pf.Domain, Bus: uint8(at >> 8), Device: uint8(at>>3) & 31, Function: uint8(at) & 7})
	}
	return out, nil
}

// CompareDevices orders PCI devices by address, and all others after them by name.
func CompareDevices(a, b Device) int {
	switch {
	case a.PCI && b.PCI:
		return a.Address.Compare(b.Address)
	case a.PCI:
		return -1
	case b.PCI:
		return 1
	}
	return cmp.Compare(a.Name, b.Name)
}

func findDevice(devices []Device, a Address) *Device {
	// Copies no Device.
	i := sort.Search(len(devices), func(i int) bool { return devices[i].Address.Compare(a) >= 0 })
	if i == len(devices) || devices[i].Address != a {
		return nil
	}
	return &devices[i]
}

// chunk is how many devices must be there for a second thread to bring more than it costs.
const chunk = 16

// sideBySide calls what reads different things of so many devices, and returns the first error.
func sideBySide(devices int, one, other func() error) error {
	if devices < chunk {
		return cmp.Or(one(), other())
	}
	var wg sync.WaitGroup
	var second error
	wg.Go(func() { second = other() })
	first := one()
	wg.Wait()
	return cmp.Or(first, second)
}

// readAll reads the directories names of dir side by side; sysfs takes no lock that would keep readers apart. What
// vanished is left out.
func readAll[T any](h *Host, dir string, names []string, read func(*host.Dir, string) (T, error)) ([]T, error) {
	if len(names) == 0 {
		return nil, nil
	}
	base, err := h.Open(dir)
	if err != nil {
		return nil, err
	}
	defer base.Close()
	out, errs := make([]T, len(names)), make([]error, len(names))
	one := func(i int) {
		d, err := base.Open(names[i])
		if err == nil {
			out[i], err = read(d, names[i])
			d.Close()
		}
		errs[i] = err
	}

	workers := min(runtime.NumCPU(), len(names)/chunk+1, 8)
	share := func(w int) {
		for i := w * chunk; i < len(names); i += workers * chunk {
			for j := i; j < min(i+chunk, len(names)); j++ {
				one(j)
			}
		}
	}
	var wg sync.WaitGroup
	for w := 1; w < workers; w++ {
		wg.Go(func() { share(w) })
	}
	share(0)
	wg.Wait()
	kept := out[:0]
	for i := range out {
		switch {
		case errs[i] == nil:
			kept = append(kept, out[i])
		case !host.Absent(errs[i]):
			return nil, errs[i]
		}
	}
	return kept, nil
}

// lastAddress is the PCI device nearest to the end of a sysfs path.
func lastAddress(target string) (Address, bool) {
	for target != "" && target != "." && target != "/" {
		if a, ok := parseAddress(path.Base(target)); ok {
			return a, true
		}
		i := strings.LastIndexByte(target, '/')
		if i < 0 {
			break
		}
		target = target[:i]
	}
	return Address{}, false
}

// linkVFs tells the VFs whose they are, from the PFs' virtfn links: the kernel makes a VF's physfn link together with
// them.
func linkVFs(devices []Device) {
	for i := range devices {
		if devices[i].SRIOV == nil {
			continue
		}
		for _, v := range devices[i].SRIOV.VFs {
			if vf := findDevice(devices, v.Address); vf != nil {
				pf := devices[i].Address
				vf.PhysFn, vf.VFIndex = &pf, v.Index
			}
		}
	}
}

type rawGroup struct {
	Group
	names []string
}

// readRawGroups reads the groups with their members' names.
func readRawGroups(h *Host, list func() ([]string, error)) ([]rawGroup, error) {
	ids, err := list()
	if host.Absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return readAll(h, groupsDir, ids, readGroup)
}

// sortInto sorts the devices into their groups. Members that are no PCI devices are read where they are found.
func sortInto(h *Host, raw []rawGroup, devices []Device) ([]Group, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	slices.SortFunc(raw, func(a, b rawGroup) int { return a.ID - b.ID })
	unsafe, err := withoutIOMMU(h)
	if err != nil {
		return nil, err
	}

	groups := make([]Group, len(raw))
	members := 0
	for _, r := range raw {
		members += len(r.names)
	}
	// One piece of memory, of which each group that has members has its part.
	room := make([]Device, members)
	for i, r := range raw {
		g := r.Group
		if n := len(r.names); n > 0 {
			g.Devices, room = room[:0:n], room[n:]
		}
		g.NoIOMMU = slices.Contains(unsafe, "noiommu-"+strconv.Itoa(g.ID))
		id := &groups[i].ID
		for _, name := range r.names {
			if a, ok := parseAddress(name); ok {
				if d := findDevice(devices, a); d != nil {
					d.Group = id
					g.Devices = append(g.Devices, *d)
				}
				// Else: it came or went between the two looks.
				continue
			}
			d, err := readMember(h, id, g.ID, name)
			if host.Absent(err) {
				continue
			}
			if err != nil {
				return nil, err
			}
			g.Devices = append(g.Devices, d)
		}

		if len(g.Devices) > 1 {
			slices.SortFunc(g.Devices, CompareDevices)
		}
		groups[i] = g
	}
	return groups, nil
}

// ReadGroup reads one group as it is now, with its members.
func ReadGroup(h *Host, id int) (*Group, error) {
	dir, err := h.Open(path.Join(groupsDir, strconv.Itoa(id)))
	if host.Absent(err) {
		return nil, fmt.Errorf("IOMMU group %d: %w", id, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	raw, err := readGroup(dir, strconv.Itoa(id))
	if err != nil {
		return nil, err
	}
	unsafe, err := withoutIOMMU(h)
	if err != nil {
		return nil, err
	}

	g := raw.Group
	g.NoIOMMU = slices.Contains(unsafe, "noiommu-"+strconv.Itoa(id))
	for _, name := range raw.names {
		d, err := readMember(h, &g.ID, id, name)
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		g.Devices = append(g.Devices, d)
	}
	slices.SortFunc(g.Devices, CompareDevices)
	return &g, nil
}

// withoutIOMMU are the names of the groups that VFIO made in its noiommu mode: noiommu-N.
func withoutIOMMU(h *Host) ([]string, error) {
	names, err := h.Names("sys/class/vfio")
	if host.Absent(err) {
		return nil, nil
	}
	// Every group that VFIO has is there.
	return slices.DeleteFunc(names, func(n string) bool { return !strings.HasPrefix(n, "noiommu-") }), err
}

func readGroup(dir *host.Dir, name string) (rawGroup, error) {
	id, err := strconv.Atoi(name)
	if err != nil {
		return rawGroup{}, fmt.Errorf("%s: no group number", dir.Path(""))
	}
	g := rawGroup{Group: Group{ID: id}}
	// Reading it takes the group's lock (drivers/iommu/iommu.c, iommu_group_show_type).
	if g.Type, err = optional(dir.String("type")); err != nil {
		return g, err
	}
	g.names, err = dir.Names("devices")
	return g, err
}

func readMember(h *Host, id *int, group int, name string) (Device, error) {
	dir, err := h.Open(path.Join(groupsDir, strconv.Itoa(group), "devices", name))
	if err != nil {
		return Device{}, err
	}
	defer dir.Close()
	d, err := readDevice(dir, name, true)
	d.Group = id
	return d, err
}

// Parents names the device above each device, "" for those on a root bus. A VF stands below its PF, though it is on the
// same bus.
func Parents(h *Host, t *Topology) (map[string]string, error) {
	parents := map[string]string{}
	var err error
	t.All(func(d *Device) bool {
		if d.PhysFn != nil {
			parents[d.Name] = d.PhysFn.String()
			return true
		}
		if !d.PCI {
			return true
		}
		var target string
		if target, err = optional(h.Link(path.Join(pciDevices, d.Name))); err != nil {
			return false
		}
		if chain := pathAddresses(target); len(chain) > 1 {
			parents[d.Name] = chain[len(chain)-2].String()
		}
		return true
	})
	return parents, err
}
