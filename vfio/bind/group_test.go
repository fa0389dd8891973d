package bind

import (
	"context"
	"errors"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/vfio"
	"viaduct/vfio/holder"
)

// arm is a host with an SMMU, which has put nothing into a group that never had a driver.
func arm(t *testing.T, changes hosttest.Tree) *hosttest.Kernel {
	k := hosttest.NewKernel(t, hosttest.SMMU().With(hosttest.Tree{vfio.NoIOMMUFile: "N\n"}).With(changes))
	k.LateGroups = map[string]string{"0000:00:01.0": "31"}
	return k
}

// A device that never had a driver is taken: the kernel makes its group when it is bound, which is looked at then.
func TestLateGroup(t *testing.T) {
	const device = "0000:00:01.0"
	ctx := context.Background()
	taken := func(k *hosttest.Kernel) ([]Result, *Handle, error) {
		b := open(t, k, Options{})
		r, err := b.Move(ctx, Take(Auto), read(t, b, device).Address)
		return r, b, err
	}

	k := arm(t, nil)
	_, b, err := taken(k)
	if d := read(t, b, device); err != nil || d.Driver != "vfio-pci" || !d.InGroup(31) {
		t.Fatalf("%v, on %q in group %v", err, d.Driver, d.Group)
	}
	nodes, err := vfio.Nodes(b.Host(), read(t, b, device))
	if err != nil || len(nodes) != 2 || nodes[0] != "/dev/vfio/31" {
		t.Errorf("nodes %q, %v", nodes, err)
	}
	if _, err := b.Move(ctx, GiveBack(), read(t, b, device).Address); err != nil ||
		bound(t, b, device) != [2]string{"", ""} {
		t.Errorf("given back: %v, %q", err, bound(t, b, device))
	}

	// It shares its new group with what the host uses, or no IOMMU is in front of that: it is given back.
	for group, says := range map[string]string{
		"5": "together with 0000:00:02.0 on driver e1000e", "noiommu-31": "which has no IOMMU",
	} {
		k = arm(t, nil)
		k.LateGroups[device] = group
		_, b, err = taken(k)
		if err == nil || !strings.Contains(err.Error(), says) || bound(t, b, device) != [2]string{"", ""} {
			t.Errorf("group %s: %v, left %q", group, err, bound(t, b, device))
		}
		if keys, _ := b.journal.Keys(""); len(keys) > 0 {
			t.Errorf("group %s: records %q", group, keys)
		}
	}

	k = arm(t, nil)
	k.LateGroups = nil
	if _, b, err = taken(k); err == nil || bound(t, b, device) != [2]string{"", ""} {
		t.Errorf("no IOMMU in front of it: %v, left %q", err, bound(t, b, device))
	}
	k = arm(t, hosttest.Tree{vfio.NoIOMMUFile: "Y\n"})
	if _, _, err = taken(k); !errors.Is(err, holder.ErrRefused) ||
		!strings.Contains(err.Error(), "noiommu mode is on") || len(k.Log) > 0 {
		t.Errorf("in noiommu mode: %v, writes %q", err, k.Log)
	}
}

// A group of VFIO's noiommu mode is not isolated, and nothing in it is taken.
func TestNoIOMMUGroup(t *testing.T) {
	k := arm(t, nil)
	k.LateGroups["0000:00:01.0"] = "noiommu-31"
	for _, w := range [][2]string{{"sys/bus/pci/devices/0000:00:01.0/driver_override", "vfio-pci"},
		{"sys/bus/pci/drivers_probe", "0000:00:01.0"}} {
		if err := k.Write(w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	b := open(t, k, Options{})
	topology, err := b.Topology()
	if err != nil {
		t.Fatal(err)
	}
	g, err := topology.Group(31)
	if err != nil || !g.NoIOMMU {
		t.Fatalf("%+v, %v", g, err)
	}
	_, err = b.Move(context.Background(), Take(Auto), g.Devices[0].Address)
	if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "has no IOMMU") {
		t.Error(err)
	}
	nodes, err := vfio.Nodes(b.Host(), &g.Devices[0])
	if err != nil || len(nodes) != 2 || nodes[0] != "/dev/vfio/noiommu-31" {
		t.Errorf("nodes %q, %v", nodes, err)
	}
}
