package vfio

import (
	"slices"
	"strconv"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// The nodes of a device are those that the kernel has made, once it has one; of a captured host that of its group is taken to be.
func TestNodes(t *testing.T) {
	const nic = "0000:01:00.0"
	k := hosttest.NewSmallLab(t, "0000:00:05.0", nic)
	h := &iommu.Host{Host: k.Host()}
	read := func() *iommu.Device {
		d, err := iommu.ReadDevice(h, iommu.Address{Bus: 1})
		if err != nil {
			t.Fatal(err)
		}
		return &d
	}
	if got, err := Nodes(h, read()); err != nil || len(got) > 0 {
		t.Errorf("not on a VFIO driver: %v, %v", got, err)
	}
	for _, w := range [][2]string{
		{"devices/" + nic + "/driver_override", "vfio-pci"}, {"drivers/igb/unbind", nic}, {"drivers_probe", nic},
	} {
		if err := k.Write("sys/bus/pci/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	d := read()
	want := []string{"/dev/vfio/" + groupName(d), "/dev/vfio/devices/vfio0"}
	if got, err := Nodes(h, d); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	hosttest.EachFailure(t, k, "Nodes", func() (any, error) { return Nodes(h, d) })
	hosttest.EachFailure(t, k, "Numbers", func() (any, error) { return Numbers(h, d) })

	captured := &iommu.Host{Host: hosttest.Lab(t).Host(t)}
	if got, err := Nodes(captured, d); err != nil || !slices.Equal(got, want[:1]) {
		t.Errorf("of a captured host: %v, %v", got, err)
	}
}

func groupName(d *iommu.Device) string {
	if d.Group == nil {
		return ""
	}
	return strconv.Itoa(*d.Group)
}
