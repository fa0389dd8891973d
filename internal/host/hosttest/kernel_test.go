package hosttest

import (
	"errors"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

const (
	pfAt     = "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"
	pfFiles  = "sys/bus/pci/devices/0000:01:00.0/"
	numvfs   = pfFiles + "sriov_numvfs"
	override = pfFiles + "driver_override"
	probe    = "sys/bus/pci/drivers_probe"
)

// igb is a PF on its driver with a network interface, behind a root port, both in groups.
func igb() Tree {
	return Tree{
		"sys/bus/pci/devices/0000:00:01.0": "-> ../../../devices/pci0000:00/0000:00:01.0",
		"sys/bus/pci/devices/0000:01:00.0": "-> ../../../devices/pci0000:00/0000:00:01.0/0000:01:00.0",
		"sys/bus/pci/drivers/vfio-pci/":    "",

		"sys/devices/pci0000:00/0000:00:01.0/vendor":      "0x8086\n",
		"sys/devices/pci0000:00/0000:00:01.0/device":      "0x3420\n",
		"sys/devices/pci0000:00/0000:00:01.0/class":       "0x060400\n",
		"sys/devices/pci0000:00/0000:00:01.0/iommu_group": "-> ../../../kernel/iommu_groups/0",

		pfAt + "/vendor":           "0x8086\n",
		pfAt + "/device":           "0x10c9\n",
		pfAt + "/subsystem_vendor": "0x1af4\n",
		pfAt + "/subsystem_device": "0x1100\n",
		pfAt + "/class":            "0x020000\n",
		pfAt + "/numa_node":        "-1\n",
		pfAt + "/driver":           "-> ../../../../bus/pci/drivers/igb",
		pfAt + "/iommu_group":      "-> ../../../../kernel/iommu_groups/2",
		pfAt + "/sriov_totalvfs":   "7\n",
		pfAt + "/sriov_offset":     "128\n",
		pfAt + "/sriov_stride":     "2\n",
		pfAt + "/sriov_vf_device":  "10ca\n",
		pfAt + "/net/eth0/address": "52:54:00:00:00:01\n",

		"sys/class/net/eth0": "-> ../../devices/pci0000:00/0000:00:01.0/0000:01:00.0/net/eth0",

		"sys/kernel/iommu_groups/0/devices/0000:00:01.0": "-> ../../../../devices/pci0000:00/0000:00:01.0",
		"sys/kernel/iommu_groups/2/devices/0000:01:00.0": "-> ../../../../devices/pci0000:00/0000:00:01.0/0000:01:00.0",
	}
}

func newIGB(t *testing.T) *Kernel {
	k := NewKernel(t, igb())
	k.IDs["igb"] = []string{"8086:10c9"}
	return k
}

// do makes writes of "name=value" and stops at the first that does not answer as wanted.
func do(t *testing.T, k *Kernel, want error, writes ...string) {
	t.Helper()
	for _, w := range writes {
		name, value, _ := strings.Cut(w, "=")
		if err := k.Host().Write(name, value); !errors.Is(err, want) || (want == nil && err != nil) {
			t.Fatalf("write %q: %v, want %v", w, err, want)
		}
	}
}

func driverOf(t *testing.T, k *Kernel, address string) string {
	t.Helper()
	s, err := k.Host().LinkBase("sys/bus/pci/devices/" + address + "/driver")
	if errors.Is(err, syscall.ENOENT) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestKernelErrors(t *testing.T) {
	many := strings.Repeat("x", 5000)
	for _, c := range []struct {
		name  string
		after []string // writes that succeed
		write string
		want  error
	}{
		{"missing attribute", nil, pfFiles + "nothing=1", syscall.ENOENT},
		{"missing device", nil, "sys/bus/pci/devices/0000:09:00.0/driver_override=x", syscall.ENOENT},
		{"directory", nil, "sys/bus/pci=1", syscall.EISDIR},
		{"read-only attribute", nil, pfFiles + "vendor=0x1234", syscall.EACCES},
		{"read-only attribute, nothing", nil, pfFiles + "vendor=", syscall.EACCES},
		{"long override", nil, override + "=" + many, syscall.EINVAL},
		{"probe of nothing", nil, probe + "=0000:09:00.0", syscall.ENODEV},
		{"probe of a path", nil, probe + "=../devices/0000:01:00.0", syscall.ENODEV},
		{"unbind from another driver", nil, "sys/bus/pci/drivers/vfio-pci/unbind=0000:01:00.0", syscall.ENODEV},
		{"unbind of nothing", nil, "sys/bus/pci/drivers/igb/unbind=0000:09:00.0", syscall.ENODEV},
		{"bind of nothing", nil, "sys/bus/pci/drivers/igb/bind=0000:09:00.0", syscall.ENODEV},
		{"bind without match", nil, "sys/bus/pci/drivers/vfio-pci/bind=0000:01:00.0", syscall.ENODEV},
		{"bind twice", nil, "sys/bus/pci/drivers/igb/bind=0000:01:00.0", syscall.EBUSY},
		{"bind against the override", []string{override + "=vfio-pci"}, "sys/bus/pci/drivers/igb/bind=0000:01:00.0",
			syscall.ENODEV},
		{"bind of a bound one by override", []string{override + "=vfio-pci"},
			"sys/bus/pci/drivers/vfio-pci/bind=0000:01:00.0", syscall.EBUSY},
		{"bind of a bridge", []string{"sys/bus/pci/devices/0000:00:01.0/driver_override=vfio-pci"},
			"sys/bus/pci/drivers/vfio-pci/bind=0000:00:01.0", syscall.EINVAL},
		{"not a number", nil, numvfs + "=many", syscall.EINVAL},
		{"negative", nil, numvfs + "=-1", syscall.EINVAL},
		{"over 16 bits", nil, numvfs + "=65536", syscall.EINVAL},
		{"underscore", nil, numvfs + "=0x_1", syscall.EINVAL},
		{"above total", nil, numvfs + "=8", syscall.ERANGE},
		{"above total in octal", nil, numvfs + "=010", syscall.ERANGE},
		{"another count", []string{numvfs + "=2"}, numvfs + "=3", syscall.EBUSY},
		{"no driver", []string{"sys/bus/pci/drivers/igb/unbind=0000:01:00.0"}, numvfs + "=1", syscall.ENOENT},
		{"vfio driver", []string{"sys/bus/pci/drivers/igb/unbind=0000:01:00.0", override + "=vfio-pci",
			probe + "=0000:01:00.0"}, numvfs + "=1", syscall.ENOENT},
		{"autoprobe", nil, pfFiles + "sriov_drivers_autoprobe=2", syscall.EINVAL},
		{
			"VF without autoprobe and override", []string{pfFiles + "sriov_drivers_autoprobe=0", numvfs + "=1"},
			"sys/bus/pci/drivers/igbvf/bind=0000:02:10.0", syscall.ENODEV,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newIGB(t)
			k.Register("igbvf", "8086:10ca")
			k.Register("igbvf2", "8086:10ca")
			do(t, k, nil, c.after...)
			do(t, k, c.want, c.write)
		})
	}
}

func TestKernelRebind(t *testing.T) {
	k := newIGB(t)
	var seen []string
	k.After = func(name, value string) { seen = append(seen, name+"="+value) }
	writes := []string{
		override + "=vfio-pci\n", "sys/bus/pci/drivers/igb/unbind=0000:01:00.0\n", probe + "=0000:01:00.0",
	}

	do(t, k, nil, writes...)
	if got := driverOf(t, k, "0000:01:00.0"); got != "vfio-pci" {
		t.Errorf("driver %q", got)
	}
	if got, _ := k.Host().Names(pfFiles + "vfio-dev"); !slices.Equal(got, []string{"vfio0"}) {
		t.Errorf("vfio-dev has %v", got)
	}

	if k.Host().Exists("sys/class/net/eth0") || k.Host().Exists(pfFiles+"net") ||
		k.Host().Exists("sys/bus/pci/drivers/igb/0000:01:00.0") {
		t.Error("the interface outlived its driver")
	}

	if !slices.Equal(seen, writes) || !slices.Equal(k.Log, writes) {
		t.Errorf("After saw %q, the log has %q", seen, k.Log)
	}

	do(t, k, nil, override+"=") // a write of nothing reaches nobody
	if s, _ := k.Host().String(override); s != "vfio-pci" {
		t.Errorf("override is %q", s)
	}

	do(t, k, nil, override+"=\n", "sys/bus/pci/drivers/vfio-pci/unbind=0000:01:00.0", probe+"=0000:01:00.0",
		probe+"=0000:01:00.0")
	if got := driverOf(t, k, "0000:01:00.0"); got != "igb" {
		t.Errorf("driver %q", got)
	}

	if s, _ := k.Host().String("sys/class/net/eth0/address"); s != "52:54:00:00:00:01" ||
		k.Host().Exists(pfFiles+"vfio-dev") {
		t.Errorf("address %q", s)
	}

	if s, _ := k.Host().String(override); s != "(null)" {
		t.Errorf("override is %q", s)
	}
}

func TestKernelProbeSucceedsWithoutBinding(t *testing.T) {
	k := newIGB(t)
	do(t, k, nil, override+"=none", "sys/bus/pci/drivers/igb/unbind=0000:01:00.0", probe+"=0000:01:00.0")
	k.Probe["vfio-pci"] = syscall.EBUSY
	do(t, k, nil, override+"=vfio-pci", probe+"=0000:01:00.0")
	do(t, k, syscall.EBUSY, "sys/bus/pci/drivers/vfio-pci/bind=0000:01:00.0")
	if got := driverOf(t, k, "0000:01:00.0"); got != "" {
		t.Errorf("driver %q", got)
	}
}

func TestKernelHooks(t *testing.T) {
	k := newIGB(t)
	k.Fail[probe] = syscall.EIO
	k.After = func(name, value string) {
		if name == "sys/bus/pci/drivers/igb/unbind" { // another tool
			k.After = nil
			k.Register("thief", "8086:10c9")
		}
	}
	do(t, k, nil, "sys/bus/pci/drivers/igb/unbind=0000:01:00.0")
	if got := driverOf(t, k, "0000:01:00.0"); got != "thief" {
		t.Errorf("driver %q", got)
	}
	do(t, k, syscall.EIO, probe+"=0000:01:00.0")
}

func TestKernelVFs(t *testing.T) {
	k := newIGB(t)
	k.Register("igbvf", "8086:10ca")
	before := readTree(t, k.Dir())
	do(t, k, nil, numvfs+"=0x7\n")
	for i, address := range []string{"0000:01:10.0", "0000:01:10.2", "0000:01:10.4", "0000:01:10.6", "0000:01:11.0",
		"0000:01:11.2", "0000:01:11.4"} {
		vf, err := k.Host().LinkBase(pfFiles + "virtfn" + strconv.Itoa(i))
		if err != nil || vf != address || driverOf(t, k, address) != "igbvf" {
			t.Errorf("VF %d: %q, %v, driver %q", i, vf, err, driverOf(t, k, address))
		}
	}

	got := map[string]string{}
	for _, f := range []string{"vendor", "device", "class", "modalias", "driver_override"} {
		got[f], _ = k.Host().String("sys/bus/pci/devices/0000:01:10.0/" + f)
	}

	for _, f := range []string{"physfn", "iommu_group", "driver"} {
		got[f], _ = k.Host().Link("sys/bus/pci/devices/0000:01:10.0/" + f)
	}

	want := map[string]string{
		"vendor": "0x8086", "device": "0x10ca", "class": "0x020000", "driver_override": "(null)",
		"modalias": "pci:v00008086d000010CAsv00001AF4sd00001100bc02sc00i00",
		"physfn":   "../0000:01:00.0", "iommu_group": "../../../../kernel/iommu_groups/1",
		"driver": "../../../../bus/pci/drivers/igbvf",
	}

	if !reflect.DeepEqual(got, want) {
		t.Errorf("VF 0 is %v\nwant %v", got, want)
	}

	groups, _ := k.Host().Names("sys/kernel/iommu_groups")
	if !slices.Equal(groups, []string{"0", "1", "2", "3", "4", "5", "6", "7", "8"}) {
		t.Errorf("groups %v", groups)
	}

	do(t, k, nil, numvfs+"=7", numvfs+"=0")
	if after := readTree(t, k.Dir()); !reflect.DeepEqual(before, after) {
		t.Errorf("after removal\n%s\nwant\n%s", Format(after), Format(before))
	}

	k.Partial = 2
	do(t, k, nil, numvfs+"=5")
	if s, _ := k.Host().String(numvfs); s != "2" || k.Host().Exists(pfFiles+"virtfn2") {
		t.Errorf("sriov_numvfs is %q", s)
	}

	do(t, k, nil, "sys/bus/pci/drivers/igb/unbind=0000:01:00.0") // takes the VFs along
	if k.Host().Exists("sys/bus/pci/devices/0000:01:10.0") {
		t.Error("VFs outlived the PF's driver")
	}
}

func TestKernelVFsForGuests(t *testing.T) {
	k := newIGB(t)
	k.Register("igbvf", "8086:10ca")
	do(t, k, nil, pfFiles+"sriov_drivers_autoprobe=0", numvfs+"=1", probe+"=0000:01:10.0")
	if got := driverOf(t, k, "0000:01:10.0"); got != "" {
		t.Errorf("driver %q without autoprobe", got)
	}
	do(t, k, nil, pfFiles+"virtfn0/driver_override=igbvf", "sys/bus/pci/drivers/igbvf/bind=0000:01:10.0")
	if got := driverOf(t, k, "0000:01:10.0"); got != "igbvf" {
		t.Errorf("driver %q with an override", got)
	}
	do(t, k, nil, numvfs+"=0", numvfs+"=1")
	if s, _ := k.Host().String(pfFiles + "virtfn0/driver_override"); s != "(null)" ||
		driverOf(t, k, "0000:01:10.0") != "" {
		t.Error("the override outlived its VF")
	}
}

func TestKernelBusNumbers(t *testing.T) {
	tree := igb().With(Tree{pfAt + "/sriov_offset": "256\n"})
	k := NewKernel(t, tree)
	do(t, k, nil, numvfs+"=1")
	if !k.Host().Exists("sys/bus/pci/devices/0000:02:00.0") {
		t.Error("no VF on the next bus")
	}
	k = NewKernel(t, igb().With(Tree{pfAt + "/sriov_offset": "65000\n", pfAt + "/sriov_stride": "256\n"}))
	do(t, k, syscall.ENOMEM, numvfs+"=7")
	if k.Host().Exists(pfFiles + "virtfn0") {
		t.Error("a refused write made a VF")
	}
}
