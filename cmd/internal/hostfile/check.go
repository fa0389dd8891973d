package hostfile

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"viaduct/iommu"
	"viaduct/sriov"
)

func isEnd(err error) bool { return errors.Is(err, io.EOF) }

// check tells what each value by itself does not show.
func (d *decoder) check(h *Host) {
	for i := range h.PFs {
		d.checkPF(&h.PFs[i])
	}
	for i := range h.Devices {
		dev := &h.Devices[i]
		if dev.Initramfs && !dev.Select.Has(iommu.ByAddress, iommu.ByPath) {
			d.failAt(
				dev.At,
				dev.Select.String(),
				"a device in the initramfs has no driver and no interface yet: select it by its path= (viaduct show "+
					"prints it)",
			)
		}
	}
	if err := h.twice(); err != nil {
		d.errs = append(d.errs, err)
	}
}

func (d *decoder) checkPF(pf *PF) {
	for _, m := range pf.matches() {
		if m.Has(iommu.ByClass) {
			d.failAt(pf.At, m.String(), "a class does not select a PF; want mac=, path=, serial= or ids with a path")
		}
	}
	if pf.Count == 0 && len(pf.VFs) > 0 {
		d.failAt(pf.VFs[0].At, "", "count is 0, so there are no VFs to describe")
		return
	}

	owner := make([]*VFs, pf.Count)
	seen := map[string]bool{}
	for i := range pf.VFs {
		r := &pf.VFs[i]
		if r.Range.last() >= pf.Count {
			d.failAt(r.At, r.Range.String(), "there are %d VFs, 0 to %d", pf.Count, pf.Count-1)
		}
		indexes := r.Range.Indexes(pf.Count)
		for _, n := range indexes {
			if owner[n] != nil {
				d.failAt(r.At, r.Range.String(), "VF %d is already in the range on line %d", n, owner[n].At.Line)
				break
			}
			owner[n] = r
		}

		d.checkAddresses(r, indexes, seen, len(pf.All) > 0)
		if len(indexes) > 0 {
			for k, v := range r.Settings {
				// With the greatest index, as for the least it was looked at already.
				text := v.Of(indexes[len(indexes)-1])
				if _, err := sriov.ParseSettings([]string{string(k) + "=" + text}); v.plus && err != nil {
					d.failAt(r.At, v.String(), "%s of VF %d would be %s: %v", k, indexes[len(indexes)-1], text,
						reason(err))
				}
			}
		}

		_, qos := r.Settings[sriov.QoS]
		_, proto := r.Settings[sriov.Proto]
		if _, vlan := r.Settings[sriov.VLAN]; !vlan && (qos || proto) {
			d.failAt(r.At, "", "qos and proto need the key vlan")
		}
		if r.Driver != sriov.UseHome && r.Network != "" {
			d.failAt(r.At, r.Network, "only VFs on the host's driver have an interface here: it is for driver: home")
		}
		if r.Driver == sriov.UseHome && r.Pool != "" {
			d.failAt(r.At, r.Pool, "a pool is for guests, which cannot have VFs on the host's driver (driver: home)")
		}
	}

	if pf.AfterBond && pf.Eswitch != "switchdev" {
		d.failAt(pf.At, "after_bond", "needs eswitch: switchdev: it is for the PFs of a bond in that mode")
	}
}

// checkAddresses tells of VFs that would have one address, of a PF or, with many, of several: seen are those of the
// ranges before.
func (d *decoder) checkAddresses(r *VFs, indexes []int, seen map[string]bool, many bool) {
	for _, k := range addresses {
		value, ok := r.Settings[k]
		same := !value.plus && value.word != sriov.StableMAC
		if ok && same && (len(indexes) > 1 || many || seen[string(k)+value.word]) {
			d.failAt(r.At, value.word, "each VF needs its own %s (%s: %s derives them)", names[k], k,
				sriov.StableMAC)
		}
		for _, n := range indexes {
			seen[string(k)+value.Of(n)] = true
		}
	}
}

// addresses are the settings that no two VFs may have alike, and names what they are.
var (
	addresses = []sriov.Key{sriov.MAC, sriov.NodeGUID, sriov.PortGUID}
	names     = map[sriov.Key]string{
		sriov.MAC: "MAC address", sriov.NodeGUID: "node GUID", sriov.PortGUID: "port GUID",
	}
)

// matches are what names an entry's PFs.
func (pf *PF) matches() []Match {
	if len(pf.All) > 0 {
		return pf.All
	}
	return []Match{pf.Select}
}

// twice finds what is declared more than once in the same words, and addresses that VFs of several PFs are to have.
func (h *Host) twice() error {
	var errs []error
	seen := map[string]Pos{}
	see := func(m Match, at Pos) {
		name := m.String()
		if first, again := seen[name]; again {
			errs = append(errs, &Error{at, name, fmt.Sprintf("this is already declared at %s", first)})
			return
		}
		seen[name] = at
	}

	type owner struct {
		pf int
		at Pos
	}
	owners := map[string]owner{}
	for i, pf := range h.PFs {
		for _, m := range pf.matches() {
			see(m, pf.At)
		}
		for _, r := range pf.VFs {
			for _, k := range addresses {
				for _, n := range r.Range.Indexes(pf.Count) {
					value := strings.ToLower(r.Settings[k].Of(n))
					if value == "" || value == sriov.StableMAC || strings.Trim(value, "0:") == "" {
						break
					}
					first, again := owners[string(k)+value]
					if !again {
						owners[string(k)+value] = owner{i, r.At}
						continue
					}
					if first.pf != i {
						// Within a PF, that is told already.
						errs = append(errs, &Error{r.At, value, fmt.Sprintf("the VF at %s already has this %s: each "+
							"needs its own (%s: %s derives them)", first.at, names[k], k, sriov.StableMAC)})
						break
					}
				}
			}
		}
	}

	for _, dev := range h.Devices {
		see(dev.Select, dev.At)
	}
	return errors.Join(errs...)
}
