package iommu

import (
	"errors"
	"testing"

	"viaduct/internal/host/hosttest"
)

// A look of which a part fails tells so, or finds the same.
func TestLooksThatFail(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0", "0000:00:08.0", "0000:07:01.0", "0000:07:02.0")
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", "2"}} {
		if err := k.Write("sys/bus/pci/devices/0000:01:00.0/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}

	h := &Host{k.Host()}
	pf := Address{Bus: 1}
	for what, look := range map[string]func() (any, error){
		"Scan":               func() (any, error) { t, err := Scan(h); return groupsOf(t), err },
		"ReadDevice":         func() (any, error) { return ReadDevice(h, pf) },
		"ReadDriver":         func() (any, error) { return ReadDriver(h, pf) },
		"ReadDriverOverride": func() (any, error) { return ReadDriverOverride(h, pf) },
		"ReadNetdevs": func() (any, error) {
			d := Device{Address: pf}
			err := ReadNetdevs(h, &d)
			return d.Interfaces(), err
		},
		"ScanSome": func() (any, error) {
			t, err := ScanSome(h, []Address{pf, {Bus: 7, Device: 1}})
			return groupsOf(t), err
		},
		"Grouping": func() (any, error) {
			g, err := NewGrouping(h)
			if err != nil {
				return nil, err
			}
			c := g.Of(Address{Bus: 7, Device: 1})
			if !c.Known {
				return nil, errors.New("not known")
			}
			return []any{c.Members, g.Edges(c.Members)}, nil
		},
		"ClassDevices": func() (any, error) { return ClassDevices(h, pf) },
		"PathOf": func() (any, error) {
			d, err := ReadDevice(h, pf)
			path, err2 := PathOf(h, &d)
			return path, first(err, err2)
		},
		"PermanentMAC":    func() (any, error) { return PermanentMAC(h, "enp1s0") },
		"ReservedRegions": func() (any, error) { return ReservedRegions(h, 7) },
	} {
		hosttest.EachFailure(t, k, what, look)
	}
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func groupsOf(t *Topology) any {
	if t == nil {
		return nil
	}
	return []any{t.Groups, t.Ungrouped, t.Units}
}
