package verify

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio"
	"viaduct/vfio/holder"
)

const nic = "0000:01:00.0"

// newHost is the lab's host with its NIC on vfio-pci, on a kernel that was changed first.
func newHost(t *testing.T, change func(*hosttest.Kernel, *hosttest.VFIO)) (*iommu.Device, *iommu.Host,
	*iommu.Topology) {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", nic)
	v := k.ServeVFIO()
	for _, w := range [][2]string{
		{"devices/" + nic + "/driver_override", "vfio-pci"}, {"drivers/igb/unbind", nic}, {"drivers_probe", nic},
	} {
		if err := k.Write("sys/bus/pci/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	// 16 MiB are free, of which a quarter may be mapped.
	put(k, "proc/meminfo", "MemTotal: 32768 kB\nMemAvailable:      16384 kB\n")
	put(k, hugeFolder+"/hugepages-2048kB/free_hugepages", "8\n")
	put(k, hugeFolder+"/hugepages-2048kB/resv_hugepages", "0\n")
	d := &hosttest.VFIODevice{Vectors: [5]uint32{1, 1, 4, 1, 1}, State: 2, Together: []string{nic}}
	d.Regions = [9]uint64{0: 1 << 16, 7: 4096}
	v.Devices[nic] = d
	change(k, v)

	h := &iommu.Host{Host: k.Host()}
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	device, err := topology.Find(iommu.Address{Bus: 1})
	if err != nil {
		t.Fatal(err)
	}
	return device, h, topology
}

// verifyOn verifies the lab's NIC, on vfio-pci, on a kernel that was changed first.
func verifyOn(t *testing.T, o Options, change func(*hosttest.Kernel, *hosttest.VFIO)) *Report {
	t.Helper()
	device, h, topology := newHost(t, change)
	r, err := Run(t.Context(), h, topology, device, o)
	if err != nil {
		t.Fatal(err)
	}
	if r.Usable != (len(r.Reasons) == 0) {
		t.Errorf("usable %v, reasons %q", r.Usable, r.Reasons)
	}
	return r
}

// put makes a file of the kernel's.
func put(k *hosttest.Kernel, name, content string) {
	name = filepath.Join(k.Dir(), name)
	err := os.MkdirAll(filepath.Dir(name), 0o755)
	if err == nil {
		err = os.WriteFile(name, []byte(content), 0o644)
	}
	if err != nil {
		panic(err)
	}
}

func nothing(*hosttest.Kernel, *hosttest.VFIO) {}

// TestUsable: all of a device that works is told.
func TestUsable(t *testing.T) {
	r := verifyOn(t, Options{}, nothing)
	if !r.Usable || len(r.Notes) > 0 {
		t.Errorf("%q, %q", r.Reasons, r.Notes)
	}
	for way, w := range r.Ways {
		if !w.OK || !w.Exists || w.Error != nil || *w.AddressWidth != 48 || len(w.IOVARanges) != 2 ||
			len(w.Reserved) != 1 ||
			len(w.Mapping) != 1 || w.Mapping[0].Size != 4<<20 || w.Interrupt == nil || !*w.Interrupt {
			t.Errorf("%s: %+v", way, w)
		}
		if told := way == vfio.Container; (w.PageSizes != nil) != told || (w.MappingsLeft != nil) != told {
			t.Errorf("%s tells what it cannot: %+v", way, w)
		}
	}
	if len(r.Regions) != 2 || r.Regions[0].Name != "BAR 0" || r.Regions[0].Mappable != 1<<16 || len(r.Interrupts) != 5 {
		t.Errorf("%+v, %+v", r.Regions, r.Interrupts)
	}
	if !*r.Reset.Worked || *r.Migration.OK || *r.DirtyTracking.IOMMU.OK || *r.DirtyTracking.Device.OK {
		t.Errorf("%+v, %+v, %+v", r.Reset, r.Migration, r.DirtyTracking)
	}
}

// TestNotUsable: what is wrong is a reason; what one way lacks, and another has, is a note at most.
func TestNotUsable(t *testing.T) {
	failing := func(requests ...uintptr) func(*hosttest.Kernel, *hosttest.VFIO) {
		return func(_ *hosttest.Kernel, v *hosttest.VFIO) {
			v.Fail = func(request uintptr) error {
				if slices.Contains(requests, request) {
					return unix.EIO
				}
				return nil
			}
		}
	}

	for name, c := range map[string]struct {
		change       func(*hosttest.Kernel, *hosttest.VFIO)
		reason, note string
	}{
		"interrupts are not isolated": {func(_ *hosttest.Kernel, v *hosttest.VFIO) { v.Isolated = false },
			"not isolated", ""},
		"iommufd fails":         {failing(0x3b76), "", "iommufd does not work"},
		"the container fails":   {failing(0x3b66), "", "container does not work"},
		"nothing can be mapped": {failing(0x3b71, 0x3b85), "VFIO_IOMMU_MAP_DMA", ""},
		"no interrupt":          {failing(0x3b6e), "VFIO_DEVICE_SET_IRQS", ""},
		"the reset fails":       {failing(0x3b6f), "cannot be reset, although", ""},
		"no reset": {func(_ *hosttest.Kernel, v *hosttest.VFIO) { v.Devices[nic].NoReset = true }, "",
			"it cannot be reset"},
		"no iommufd": {func(k *hosttest.Kernel, _ *hosttest.VFIO) {
			_ = os.Remove(filepath.Join(k.Dir(),
				"dev/iommu"))
		}, "", ""},
		"no huge pages": {func(k *hosttest.Kernel, _ *hosttest.VFIO) {
			put(k, hugeFolder+"/hugepages-2048kB/free_hugepages", "3\n")
		}, "", "no huge pages of 2 MiB"},
		"dead after the reset": {func(_ *hosttest.Kernel, v *hosttest.VFIO) { v.Devices[nic].Dies = true },
			"reads as all ones", ""},
		"no memory": {func(k *hosttest.Kernel, _ *hosttest.VFIO) { put(k, "proc/meminfo", "MemAvailable: 100 kB\n") },
			"",
			"not enough free memory"},
		"no range that is large enough": {func(_ *hosttest.Kernel, v *hosttest.VFIO) {
			v.Allowed = [][2]uint64{{0, 1<<20 - 1}}
		}, "no free range of 0x400000 bytes", ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := verifyOn(t, Options{}, c.change)
			for _, told := range []struct {
				what string
				want string
				all  []string
			}{{"reasons", c.reason, r.Reasons}, {"notes", c.note, r.Notes}} {
				if got := strings.Join(told.all, "\n"); told.want == "" && got != "" ||
					!strings.Contains(got, told.want) {
					t.Errorf("%s: %q, want %q", told.what, got, told.want)
				}
			}
		})
	}
}

// TestInUse: who only the kernel knows to have it keeps it from being opened.
func TestInUse(t *testing.T) {
	device, h, topology := newHost(t, func(_ *hosttest.Kernel, v *hosttest.VFIO) {
		v.Fail = func(request uintptr) error {
			if request == 0x3b76 || request == 0x3b68 {
				return unix.EBUSY
			}
			return nil
		}
	})
	if _, err := Run(t.Context(), h, topology, device, Options{}); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("%v", err)
	}
}

// TestMigration tells what a driver that can has.
func TestMigration(t *testing.T) {
	r := verifyOn(t, Options{}, func(_ *hosttest.Kernel, v *hosttest.VFIO) {
		v.Devices[nic].Migration, v.Devices[nic].Log, v.Devices[nic].Content = 5, true, make([]byte, 99)
		v.Dirty, v.Hardware, v.Info = true, 4, make([]byte, 16)
	})
	if m := r.Migration; !*m.OK || *m.P2P || !*m.PreCopy || *m.DataSize != 99 || m.Reason != nil {
		t.Errorf("%+v", m)
	}
	if d := r.DirtyTracking; !*d.Device.OK || !*d.IOMMU.OK || *r.Ways[vfio.IOMMUFD].IOMMU != "amd-vi" {
		t.Errorf("%+v", d)
	}
}

// TestGuestMemory compares where a guest has its memory with what can be mapped.
func TestGuestMemory(t *testing.T) {
	const gib = 1 << 30
	amd := [][2]uint64{{0, 0xfedfffff}, {0xfef00000, 0xfcffffffff}, {1 << 40, 1<<48 - 1}}
	narrow := [][2]uint64{{0, 0xfedfffff}, {0xfef00000, 1<<35 - 1}}
	for _, c := range []struct {
		memory  uint64
		allowed [][2]uint64
		fits    bool
		note    string
	}{
		{8 * gib, amd, true, ""}, {1008 * gib, amd, true, ""}, {1020 * gib, amd, true, "avoids the range"},
		{16 * gib, narrow, true, ""}, {64 * gib, narrow, false, ""},
	} {
		r := verifyOn(t, Options{Memory: c.memory}, func(_ *hosttest.Kernel,
			v *hosttest.VFIO) {
			v.Allowed = c.allowed
		})
		fits := r.Memory.OK != nil && *r.Memory.OK
		if fits != c.fits || fits != r.Usable || fits != (len(r.Memory.Missing) == 0) ||
			!strings.Contains(strings.Join(r.Notes, "\n"), c.note) {
			t.Errorf("%d GiB: %+v, %q, %q", c.memory/gib, r.Memory, r.Reasons, r.Notes)
		}
	}

	r := verifyOn(t, Options{Memory: gib}, func(k *hosttest.Kernel, _ *hosttest.VFIO) {
		put(k, hugeFolder+"/hugepages-2048kB/free_hugepages", "600\n")
		put(k, hugeFolder+"/hugepages-2048kB/resv_hugepages", "100\n")
		put(k, hugeFolder+"/hugepages-1048576kB/free_hugepages", "1\n")
		put(k, hugeFolder+"/hugepages-1048576kB/resv_hugepages", "0\n")
	})
	if want := []Huge{{2 << 20, 500, false}, {gib, 1, true}}; len(r.Memory.HugePages) != 2 ||
		r.Memory.HugePages[0] != want[0] || r.Memory.HugePages[1] != want[1] {
		t.Errorf("%+v", r.Memory.HugePages)
	}
}
