package node

import (
	"errors"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/cmd/lease"
	"viaduct/iommu"
	"viaduct/vfio"
)

// Read reads what the host tells of the functions that are declared, beside what the books tell.
func Read(h *iommu.Host, b *lease.Books) (*Facts, error) {
	f := &Facts{
		Root: map[iommu.Address]string{}, Link: map[iommu.Address]string{}, Nodes: map[iommu.Address][]string{},
		Missing: map[iommu.Address]string{}, IOMMUFD: map[iommu.Address]bool{}, Keeps: map[iommu.Address]string{},
		Guarded: map[iommu.Address]string{}, Topology: b.Topology(), Pools: b.Pools(),
	}
	var err error
	if f.Leases, err = b.Leases(); err != nil {
		return nil, err
	}

	roots := map[iommu.Address]string{} // by PF, or by the function itself
	links := map[iommu.Address]bool{}
	all := f.declared()
	for _, d := range all {
		if err := f.read(h, b, d, roots, links); err != nil {
			return nil, err
		}
	}
	if b.Protected(all...) != nil {
		for _, d := range all {
			if err := b.Protected(d); err != nil {
				f.Guarded[d.Address] = err.Error()
			}
		}
	}
	return f, nil
}

// Unseen says of what is declared for guests why it cannot be looked at. What is known not to be there is not among
// that.
func (f *Facts) Unseen() []string {
	var out []string
	for _, p := range f.Pools {
		switch {
		case p.Err == nil || errors.Is(p.Err, iommu.ErrNotFound):
		case p.Name == "":
			out = append(out, "declared devices cannot be looked at: "+p.Err.Error())
		default:
			out = append(out, "functions of a pool cannot be looked at: "+p.Err.Error())
		}
	}
	return out
}

// declared are the functions that are declared, and those that go with them.
func (f *Facts) declared() []*iommu.Device {
	var out []*iommu.Device
	seen := map[iommu.Address]bool{}
	for _, p := range f.Pools {
		for _, d := range p.Devices {
			for _, one := range together(f.Topology, d) {
				if one.PCI && !seen[one.Address] {
					seen[one.Address] = true
					out = append(out, one)
				}
			}
		}
	}
	return out
}

// read reads of one function. What its PF tells is asked once.
func (f *Facts) read(h *iommu.Host, b *lease.Books, d *iommu.Device, roots map[iommu.Address]string,
	links map[iommu.Address]bool) error {
	of := d.Address
	if d.PhysFn != nil {
		of = *d.PhysFn
	}
	root, known := roots[of]
	if !known {
		root = rootOf(h, d)
		roots[of] = root
	}
	f.Root[d.Address] = root
	if why := b.Quarantined(d); why != "" {
		f.Keeps[d.Address] = d.Name + " is in quarantine: " + why
	}

	if d.PhysFn != nil && !links[of] {
		links[of] = true
		if pf, err := f.Topology.Find(of); err == nil {
			if down := linkDown(h, pf); down != "" {
				f.Link[of] = down
			}
		}
	}
	if !d.VFIO {
		return nil
	}
	return f.readNodes(h, d)
}

// readNodes reads which nodes a function on a VFIO driver has, and whether they are in /dev.
func (f *Facts) readNodes(h *iommu.Host, d *iommu.Device) error {
	nodes, err := vfio.Nodes(h, d)
	if err != nil {
		return err
	}
	f.Nodes[d.Address] = nodes
	if len(nodes) == 0 {
		f.Missing[d.Address] = "the VFIO node"
	}
	for _, n := range nodes {
		if !h.Exists(strings.TrimPrefix(n, "/")) {
			f.Missing[d.Address] = n
		}
	}
	ways, err := vfio.Ways(h, d)
	if err != nil {
		return err
	}
	for _, w := range ways {
		f.IOMMUFD[d.Address] = f.IOMMUFD[d.Address] || w == vfio.IOMMUFD
	}
	return nil
}

// rootOf is the root bus that a device is below, as its folder in sysfs is called.
func rootOf(h *iommu.Host, d *iommu.Device) string {
	where, err := iommu.PathOf(h, d)
	if err != nil {
		return ""
	}
	top, _, _ := strings.Cut(where, "/")
	colon := strings.LastIndex(top, ":")
	if colon < 0 {
		return ""
	}
	return "pci" + top[:colon]
}

// linkDown is the interface of a PF that is up and has lost its link; "" if one has a link, or that cannot be told. One
// that the host keeps down is no fault.
func linkDown(h *iommu.Host, pf *iommu.Device) string {
	down := ""
	for _, n := range pf.Netdevs {
		dir := path.Join("sys/class/net", n)
		// Documentation/ABI/testing/sysfs-class-net; "unknown" is what drivers say that do not tell.
		state, err1 := h.String(path.Join(dir, "operstate"))
		flags, err2 := h.String(path.Join(dir, "flags"))
		if err1 != nil || err2 != nil {
			continue
		}
		up, err := strconv.ParseUint(flags, 0, 32)
		switch lost := state == "down" || state == "lowerlayerdown"; {
		case err != nil || up&unix.IFF_UP == 0:
		case lost:
			down = n
		default:
			return ""
		}
	}
	return down
}
