package iommu_test

import (
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// How a device is reset afterwards is known before a guest has it: by what the kernel offers, and by what shares its
// bus.
func TestResetOf(t *testing.T) {
	const (
		root    = "0000:00:03.0"
		single  = "0000:00:01.0/0000:01:00.0"
		one     = "0000:00:02.0/0000:02:00.0"
		two     = "0000:00:02.0/0000:02:00.1"
		address = len("0000:02:00.0")
	)
	without := hosttest.Tree{}
	for _, c := range []struct {
		name  string
		at    string
		files hosttest.Tree
		way   iommu.ResetWay
		with  string
		words string
	}{
		{"its own", one, hosttest.Tree{"reset": "", "reset_method": "flr bus\n"}, iommu.ResetFunction, "",
			"by itself: flr bus"},
		{"before Linux 5.15", one, hosttest.Tree{"reset": ""}, iommu.ResetFunction, "", "a kernel older than 5.15"},
		{"said to be by its bus", one, hosttest.Tree{"reset": "", "reset_method": "bus\n"}, iommu.ResetBus,
			"0000:02:00.1",
			"only together with 0000:02:00.1"},
		{"by its bus", single, hosttest.Tree{"reset": "", "reset_method": "bus\n"}, iommu.ResetFunction, "",
			"by itself: bus"},
		{"methods turned off", single, hosttest.Tree{"reset": "", "reset_method": "\n"}, iommu.ResetBus, "",
			"which has nothing else on it"},
		{"none, alone on its bus", single, without, iommu.ResetBus, "", "which has nothing else on it"},
		{"none, with another", two, without, iommu.ResetBus, "0000:02:00.0", "only together with"},
		{"none, on a root bus", root, without, iommu.ResetNone, "", "not at all"},
	} {
		functions := []hosttest.PCI{
			{At: "0000:00:01.0", ID: "1022:43c6", Class: "060400", Group: 1},
			{At: "0000:00:02.0", ID: "1022:43c6", Class: "060400", Group: 2},
		}
		for _, at := range []string{root, single, one, two} {
			f := hosttest.PCI{At: at, ID: "8086:100e", Class: "020000", Group: 3}
			if at == c.at {
				f.Files = c.files
			}
			functions = append(functions, f)
		}
		h := &iommu.Host{Host: hosttest.NewKernel(t, hosttest.Made(functions...)).Host()}
		topology, err := iommu.Scan(h)
		if err != nil {
			t.Fatal(err)
		}
		a, err := iommu.ParseAddress(c.at[len(c.at)-address:])
		if err != nil {
			t.Fatal(err)
		}
		d, err := topology.Find(a)
		if err != nil {
			t.Fatal(err)
		}
		got, err := iommu.ResetOf(h, topology, d)
		var with []string
		for _, o := range got.With {
			with = append(with, o.Name)
		}
		if err != nil || got.Way != c.way || strings.Join(with, " ") != c.with ||
			!strings.Contains(got.String(), c.words) {
			t.Errorf("%s: %q with %q: %s, %v", c.name, got.Way, with, got, err)
		}

		nobody := got.Problem(func(*iommu.Device) bool { return false })
		everybody := got.Problem(func(*iommu.Device) bool { return true })
		if (nobody == "") != (c.way != iommu.ResetNone && c.with == "") ||
			(everybody == "") != (c.way != iommu.ResetNone) {
			t.Errorf("%s: the problem is %q, and for who has all %q", c.name, nobody, everybody)
		}
	}
}
