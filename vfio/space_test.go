package vfio

import (
	"bytes"
	"errors"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// TestTargets finds devices by each of their names, and says why it does not find others.
func TestTargets(t *testing.T) {
	k, _, host := newVFIO(t)
	const mediated = "sys/bus/mdev/devices/8ce5d3a6-3e0c-4b0c-9d2e-5f1a7c1b2d3e"
	for _, dir := range []string{mediated + "/vfio-dev/vfio9", "sys/bus/mdev/devices/none"} {
		if err := os.MkdirAll(k.Dir()+"/"+dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}

	real := "sys/bus/pci/devices/" + nic
	for name, want := range map[string]string{
		nic: nic, "01:00.0": nic, "/" + real: nic, real: nic, "/" + real + "/": nic,
		"/" + mediated: path.Base(mediated),
	} {
		d, err := findTarget(host, name)
		if err != nil || d.name != want || (d.address != nil) != (want == nic) || (d.group != nil) != (want == nic) {
			t.Errorf("%s: %+v, %v", name, d, err)
			continue
		}
		if want == nic && (d.ofGroup == nil || d.own == nil || d.own.path() != "dev/vfio/devices/vfio0") {
			t.Errorf("%s: %+v", name, d)
		}
	}

	write := func(file, value string) {
		if err := k.Write("sys/bus/pci/"+file, value); err != nil {
			t.Fatal(err)
		}
	}

	write("drivers/vfio-pci/unbind", nic)
	write("drivers/vfio-pci/unbind", other)
	write("devices/"+other+"/driver_override", "nvme")
	write("drivers_probe", other)
	for name, want := range map[string]string{
		nic:                          "it has no driver (viaduct bind 0000:01:00.0 takes it)",
		other:                        "it is on nvme (viaduct bind 0000:09:00.0 takes it)",
		"/sys/bus/mdev/devices/none": "none: it has no driver: ", "0000:0f:00.0": "no such device",
	} {
		_, err := findTarget(host, name)
		there := name != "0000:0f:00.0"
		if err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, ErrNotBound) != there {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestNumbers tells where the numbers of a device's nodes are to be read: those of its group's, and of its own.
func TestNumbers(t *testing.T) {
	k, _, host := newVFIO(t)
	d, err := iommu.ReadDevice(host, iommu.Address{Bus: 1})
	if err != nil {
		t.Fatal(err)
	}
	group := groupName(&d)
	want := []string{"sys/class/vfio/" + group + "/dev", "sys/class/vfio/noiommu-" + group + "/dev",
		"sys/bus/pci/devices/" + nic + "/vfio-dev/vfio0/dev"}
	if got, err := Numbers(host, &d); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}

	// Without an IOMMU its group's node has another name, and is none that this package opens.
	if err := os.Rename(k.Dir()+"/sys/class/vfio/"+group, k.Dir()+"/sys/class/vfio/noiommu-"+group); err != nil {
		t.Fatal(err)
	}
	if got, err := Nodes(host, &d); err != nil || !slices.Contains(got, "/dev/vfio/noiommu-"+group) {
		t.Errorf("%v, %v", got, err)
	}
	if ways, err := Ways(host, &d); err != nil || !slices.Equal(ways, []Way{IOMMUFD}) {
		t.Errorf("%v, %v", ways, err)
	}
	if found, err := findTarget(host, nic); err != nil || found.ofGroup != nil {
		t.Errorf("%+v, %v", found, err)
	}

	for content, want := range map[string]bool{"Y\n": true, "N\n": false, "": false} {
		if content != "" {
			if err := os.MkdirAll(k.Dir()+"/"+path.Dir(NoIOMMUFile), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(k.Dir()+"/"+NoIOMMUFile, []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		} else if err := os.RemoveAll(k.Dir() + "/" + NoIOMMUFile); err != nil {
			t.Fatal(err)
		}
		if on, err := NoIOMMU(host); err != nil || on != want {
			t.Errorf("%q: %v, %v", content, on, err)
		}
		hosttest.EachFailure(t, k, "NoIOMMU", func() (any, error) { return NoIOMMU(host) })
	}
}

// TestResetMethods tells the ways to reset a device, if the kernel does.
func TestResetMethods(t *testing.T) {
	k, _, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	file := k.Dir() + "/sys/bus/pci/devices/" + nic + "/reset_method"
	for _, want := range [][]string{{"flr", "bus"}, {}, nil} {
		_ = os.Remove(file)
		if want != nil {
			if err := os.WriteFile(file, []byte(strings.Join(want, " ")+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := d.ResetMethods(); err != nil || !slices.Equal(got, want) {
			t.Errorf("%v, %v", got, err)
		}
		hosttest.EachFailure(t, k, "ResetMethods", func() (any, error) { return d.ResetMethods() })
	}
}

// TestContainer opens a container of another version, or without the IOMMU that it takes.
func TestContainer(t *testing.T) {
	for name, spoil := range map[string]func(v *hosttest.VFIO){
		"version 1": func(v *hosttest.VFIO) { v.Version = 1 }, "no type1": func(v *hosttest.VFIO) { v.NoType1 = true },
	} {
		_, v, host := newVFIO(t)
		before := openFiles(t)
		spoil(v)
		if _, err := newContext(t, host, Options{Way: Container}).Open(nic); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%s: %d files are open, before %d", name, after, before)
		}
	}

	for _, request := range []uintptr{0x3b64, 0x3b65} {
		_, v, host := newVFIO(t)
		before := openFiles(t)
		v.Fail = failing(request, unix.EIO)
		if _, err := newContext(t, host, Options{Way: Container}).Open(nic); !errors.Is(err, unix.EIO) {
			t.Errorf("request %#x: %v", request, err)
		}
		if after := openFiles(t); after != before {
			t.Errorf("request %#x: %d files are open, before %d", request, after, before)
		}
	}

	own := "sys/bus/pci/devices/" + nic + "/vfio-dev"
	for way, node := range map[Way]string{Container: "sys/class/vfio", IOMMUFD: own} {
		k, _, host := newVFIO(t)
		if err := os.RemoveAll(k.Dir() + "/" + node); err != nil {
			t.Fatal(err)
		}
		if _, err := newContext(t, host, Options{Way: way}).Open(nic); !errors.Is(err, ErrUnsupported) {
			t.Errorf("by %s without its node: %v", way, err)
		}
	}
}

// TestGroup opens devices of one group: the group is opened once, and closed with the last of them.
func TestGroup(t *testing.T) {
	const one, two = "0000:07:01.0", "0000:07:02.0"
	k := hosttest.NewSmallLab(t, "0000:00:08.0", one, two, "0000:00:05.0", nic)
	v := k.ServeVFIO()
	for _, a := range []string{one, two, nic} {
		takeFor(t, k, a)
		v.Devices[a] = &hosttest.VFIODevice{}
	}

	host := &iommu.Host{Host: k.Host()}
	c := newContext(t, host, Options{Way: Container})
	count := func(request uintptr) int {
		n := 0
		for _, r := range v.Requests {
			if r == request {
				n++
			}
		}
		return n
	}

	a, b, alone := must2(c.Open(one))(t), must2(c.Open(two))(t), must2(c.Open(nic))(t)
	group := *a.target.group
	if count(0x3b68) != 2 || count(0x3b66) != 1 || !c.space.ownsGroup(group) || c.space.ownsGroup(group+100) {
		t.Errorf("%d groups are in the container, whose IOMMU was set %d times", count(0x3b68), count(0x3b66))
	}
	if err := a.Close(); err != nil || !c.space.ownsGroup(group) {
		t.Errorf("%v: the group is closed with the first device", err)
	}
	if err := b.Close(); err != nil || c.space.ownsGroup(group) {
		t.Errorf("%v: the group stays open", err)
	}
	if err := must2(c.Open(two))(t).Close(); err != nil || count(0x3b68) != 3 {
		t.Errorf("%v: the group was put into the container %d times", err, count(0x3b68))
	}

	// A device that does not open takes its group along.
	v.Fail = failing(0x3b6a, unix.EIO)
	if _, err := c.Open(one); !errors.Is(err, unix.EIO) || c.space.ownsGroup(group) {
		t.Errorf("%v: the group stays open", err)
	}

	v.Fail = failing(0x3b6b, unix.EIO)
	if _, err := c.Open(one); !errors.Is(err, unix.EIO) || c.space.ownsGroup(group) {
		t.Errorf("%v: the group stays open", err)
	}

	v.Fail = nil
	if !c.space.ownsGroup(*alone.target.group) {
		t.Error("another group was closed")
	}
	if err := must2(c.Open(one))(t).Close(); err != nil {
		t.Error(err)
	}

	// One whose IOMMU cannot be set leaves the container again.
	fresh := newContext(t, host, Options{Way: Container})
	v.Fail = failing(0x3b66, unix.EPERM)
	if _, err := fresh.Open(one); !errors.Is(err, ErrNotIsolated) || count(0x3b69) != 1 {
		t.Errorf("%v, taken out %d times", err, count(0x3b69))
	}

	v.Fail = func(request uintptr) error {
		return map[uintptr]error{0x3b66: unix.EPERM, 0x3b69: unix.EBUSY}[request]
	}

	if _, err := fresh.Open(one); !errors.Is(err, ErrNotIsolated) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("%v", err)
	}

	v.Fail = nil
}

// TestViable opens a device whose group was viable until the kernel was asked: who took a device of it is told, or else
// the kernel's own word.
func TestViable(t *testing.T) {
	const one, two = "0000:07:02.0", "0000:07:01.0"
	for _, c := range []struct {
		way     Way
		request uintptr
	}{{Container, 0x3b67}, {Container, 0x3b68}, {Container, 0x3b6a}, {IOMMUFD, 0x3b76}} {
		for _, taken := range []bool{true, false} {
			k := hosttest.NewSmallLab(t, "0000:00:08.0", one, two)
			v := k.ServeVFIO()
			v.Devices[one] = &hosttest.VFIODevice{}
			takeFor(t, k, one)
			driver := must2(k.Host().LinkBase("sys/bus/pci/devices/" + two + "/driver"))(t)
			if err := k.Write("sys/bus/pci/drivers/"+driver+"/unbind", two); err != nil {
				t.Fatal(err)
			}
			host := &iommu.Host{Host: k.Host()}
			before := openFiles(t)
			v.Fail = func(request uintptr) error {
				if request != c.request {
					return nil
				}
				v.Unviable = true
				err := k.Write("sys/bus/pci/drivers/"+driver+"/bind", two)
				if !taken {
					err = os.RemoveAll(k.Dir() + "/sys/kernel/iommu_groups") // nobody can tell
				}
				if err != nil {
					t.Error(err)
				}
				if request == 0x3b67 {
					return nil // it says so in its answer
				}
				return unix.EPERM
			}
			_, err := newContext(t, host, Options{Way: c.way}).Open(one)
			viable, ok := errors.AsType[*NotViableError](err)
			switch said := c.request == 0x3b67; {
			case taken && (!ok || len(viable.Members) != 1 || viable.Members[0].Name != two):
				t.Errorf("taken, request %#x: %v", c.request, err)
			case !taken && said && (!ok || viable.Members != nil):
				t.Errorf("not viable by itself: %v", err)
			case !taken && !said && (ok || !errors.Is(err, unix.EPERM)):
				t.Errorf("refused, request %#x: %v", c.request, err)
			}
			if after := openFiles(t); after != before {
				t.Errorf("request %#x: %d files are open, before %d", c.request, after, before)
			}
		}
	}
}

// TestNoGroup opens a device that has a node of its own, and none of a group. EINVAL is then of one that is open already,
// as nothing else is wrong.
func TestNoGroup(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EPERM, unix.EINVAL} {
		k, v, host := newVFIO(t)
		for _, file := range []string{"sys/class/vfio", "sys/bus/pci/devices/" + nic + "/iommu_group"} {
			if err := os.RemoveAll(k.Dir() + "/" + file); err != nil {
				t.Fatal(err)
			}
		}
		v.Fail = failing(0x3b76, errno)
		c := newContext(t, host, Options{})
		_, err := c.Open(nic)
		if !errors.Is(err, errno) || errors.Is(err, ErrInUse) != (errno == unix.EINVAL) ||
			errors.Is(err, ErrNotViable) {
			t.Error(err)
		}
		v.Fail = nil
		if d, err := c.Open(nic); err != nil || d.target.group != nil {
			t.Errorf("%+v, %v", d, err)
		}
	}
}

// TestUndone maps and unmaps what fails in its midst: what stays mapped is known to be.
func TestUndone(t *testing.T) {
	eachWay(t, func(t *testing.T, way Way) {
		_, v, host := newVFIO(t)
		c, _ := openOne(t, host, Options{Way: way}, nic)
		m := must2(NewMemory(4096, 0))(t)
		at := func(iova uint64) Mapping { return Mapping{IOVA: iova, Memory: m, Access: Read} }
		request := map[Way]uintptr{Container: 0x3b71, IOMMUFD: 0x3b85}[way]
		// The third is not mapped, and the others cannot be unmapped.
		made := 0
		v.Fail = func(r uintptr) error {
			if r == request {
				if made++; made == 3 {
					return unix.EIO
				}
			}
			if r == request+1 {
				return unix.ENXIO
			}
			return nil
		}
		err := c.Map(at(0x30000), at(0x10000), at(0x20000))
		left := c.Mappings()
		if !errors.Is(err, unix.EIO) || !errors.Is(err, unix.ENXIO) || len(left) != 2 || m.uses != 2 ||
			left[0].IOVA != 0x10000 || left[1].IOVA != 0x30000 {
			t.Errorf("%v: mapped are %v", err, left)
		}
		// Of two that are unmapped, the second is not.
		made = 0
		v.Fail = func(r uintptr) error {
			if r == request+1 {
				if made++; made == 2 {
					return unix.ENXIO
				}
			}
			return nil
		}
		if err := c.Unmap(0x10000, 0x21000); !errors.Is(err, unix.ENXIO) || len(c.Mappings()) != 1 || m.uses != 1 {
			t.Errorf("%v: mapped are %v", err, c.Mappings())
		}
		v.Fail = nil
		if err := c.Unmap(0x30000, 4096); err != nil || m.uses != 0 {
			t.Errorf("%v: %d uses", err, m.uses)
		}
		if err := c.space.unmapDMA(0x30000, 4096); !errors.Is(err, ErrRange) {
			t.Errorf("the kernel has nothing to unmap: %v", err)
		}
		if err := c.Map(); err != nil {
			t.Errorf("nothing to map: %v", err)
		}
		// As many as are left may be tried, of which the second is mapped already.
		many := slices.Repeat([]Mapping{at(0x10000)}, 65536)
		beyond := map[Way]error{Container: ErrLimit, IOMMUFD: ErrRange}[way]
		for n, want := range map[int]error{65535: ErrRange, 65536: beyond} {
			if err := c.Map(many[:n]...); !errors.Is(err, want) || len(c.Mappings()) != 0 || m.uses != 0 {
				t.Errorf("%d times: %v: mapped are %v", n, err, c.Mappings())
			}
		}
		// The last device takes all of them along.
		if err := c.Map(at(0x10000), at(0x20000)); err != nil || m.uses != 2 {
			t.Errorf("%v: %d uses", err, m.uses)
		}
		if err := c.devices[0].Close(); err != nil || m.uses != 0 || len(c.Mappings()) != 0 {
			t.Errorf("%v: %d uses", err, m.uses)
		}
		if _, err := c.Info(); !errors.Is(err, ErrNoDevice) {
			t.Error(err)
		}
		if c.Way() != way {
			t.Errorf("%s", c.Way())
		}
	})
}

// TestTables opens devices of IOMMUs that cannot share a page table, and tracks all of the tables, or none.
func TestTables(t *testing.T) {
	_, v, host := newVFIO(t)
	v.Dirty = true
	b := must2(NewBitmap(Range{0, 1<<20 - 1}, 4096))(t)
	for _, tracks := range []bool{false, true} {
		c := newContext(t, host, Options{DirtyTracking: true})
		must2(c.Open(nic))(t)
		if tracks {
			if err := c.TrackDirty(true); err != nil {
				t.Fatal(err)
			}
		}
		s := c.space.(*iommufd)

		// The first table is not for the other device; another one is made, which is given up if that does not work.
		refuse := func(second error, at uintptr) func(uintptr) error {
			attached := 0
			return func(request uintptr) error {
				switch {
				case request == 0x3b77 && attached == 0:
					attached++
					return unix.EINVAL
				case request == at:
					return second
				}
				return nil
			}
		}
		fails := []uintptr{0x3b89, 0x3b77}
		if tracks {
			fails = append(fails, 0x3b8b)
		}
		for _, at := range fails {
			v.Requests = nil
			v.Fail = refuse(unix.EIO, at)
			if _, err := c.Open(other); !errors.Is(err, unix.EIO) || len(s.tables) != 1 {
				t.Errorf("request %#x fails: %v, %d tables", at, err, len(s.tables))
			}
			if destroyed := slices.Contains(v.Requests, 0x3b80); destroyed != (at != 0x3b89) {
				t.Errorf("request %#x fails: the table is destroyed: %v", at, destroyed)
			}
		}
		attach := refuse(unix.EIO, 0x3b77)
		v.Fail = func(request uintptr) error {
			if request == 0x3b80 {
				return unix.EBUSY
			}
			return attach(request)
		}
		if _, err := c.Open(other); !errors.Is(err, unix.EIO) || !errors.Is(err, unix.EBUSY) {
			t.Errorf("a table that cannot be destroyed: %v", err)
		}
		// Another error than that is one.
		v.Fail = failing(0x3b77, unix.EPERM)
		if _, err := c.Open(other); !errors.Is(err, ErrNotIsolated) || len(s.tables) != 1 {
			t.Errorf("%v, %d tables", err, len(s.tables))
		}
		v.Fail = refuse(nil, 0)
		must2(c.Open(other))(t)
		if want := map[bool]int{true: 2}[tracks]; len(s.tables) != 2 || v.Tracking() != want {
			t.Errorf("%d tables, of which %d track", len(s.tables), v.Tracking())
		}

		made := 0
		second := func(request uintptr) error {
			if request == 0x3b8b {
				if made++; made == 2 {
					return unix.EIO
				}
			}
			return nil
		}
		v.Fail = second
		if err := c.TrackDirty(!tracks); !errors.Is(err, unix.EIO) || s.tracks != tracks {
			t.Errorf("%v, tracks: %v", err, s.tracks)
		}
		// What was turned on is turned off again; what was turned off stays so, and can be again.
		if want := map[bool]int{true: 1}[tracks]; v.Tracking() != want {
			t.Errorf("%d tables track", v.Tracking())
		}
		v.Fail = nil
		if err := c.TrackDirty(true); err != nil || v.Tracking() != 2 {
			t.Errorf("%v, %d tables track", err, v.Tracking())
		}
		v.Requests = nil
		if err := c.Dirty(b, true); err != nil || !slices.Equal(v.Requests, []uintptr{0x3b8c, 0x3b8c}) {
			t.Errorf("%v, asked %#x", err, v.Requests)
		}
		if err := c.TrackDirty(false); err != nil || v.Tracking() != 0 {
			t.Errorf("%v, %d tables track", err, v.Tracking())
		}
		if err := c.Dirty(b, true); !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		for _, err := range []error{c.TrackDirty(true), c.Dirty(b, true)} {
			if err == nil {
				t.Error("a context that is closed tracks")
			}
		}
	}
	without := newContext(t, host, Options{Way: IOMMUFD})
	if err := without.TrackDirty(true); !errors.Is(err, ErrNoDevice) {
		t.Error(err)
	}
	d := must2(without.Open(nic))(t)
	for _, err := range []error{without.TrackDirty(true), without.Dirty(b, true)} {
		if !errors.Is(err, ErrUnsupported) {
			t.Errorf("a context without: %v", err)
		}
	}
	short := &Bitmap{b.Range, b.Page, b.Words[1:]}
	if err := d.Log(short); !errors.Is(err, ErrRange) {
		t.Error(err)
	}
}

// TestLogs has a device note what it writes to in the ranges that it is told, and no more.
func TestLogs(t *testing.T) {
	_, v, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	v.Devices[nic].Log = true
	ranges := []Range{{0, 0xfff}, {0x10000, 0x2ffff}}
	want := [][2]uint64{{8192}, {0, 0x1000}, {0x10000, 0x20000}}
	if page, err := d.StartLog(8192, ranges); page != 8192 || err != nil || !slices.Equal(v.Devices[nic].Logs, want) {
		t.Errorf("%d, %v: %#x", page, err, v.Devices[nic].Logs)
	}
	if can, err := d.CanLog(); !can || err != nil || v.Devices[nic].Logs == nil {
		t.Errorf("%v, %v", can, err)
	}
	if err := d.StopLog(); err != nil || v.Devices[nic].Logs != nil {
		t.Errorf("%v: %#x", err, v.Devices[nic].Logs)
	}
	if page, err := d.StartLog(4096, nil); page != 4096 || err != nil || len(v.Devices[nic].Logs) != 1 {
		t.Errorf("%d, %v: %#x", page, err, v.Devices[nic].Logs)
	}
	v.Fail = failing(0x3b75, unix.EINVAL)
	if can, err := d.CanLog(); can || err != nil {
		t.Errorf("%v, %v", can, err)
	}
}

// TestManyTogether asks what is reset together where that is more than there was room for, and more than can be.
func TestManyTogether(t *testing.T) {
	_, v, host := newVFIO(t)
	_, d := openOne(t, host, Options{Way: Container}, nic)
	for _, n := range []int{1, 16, 17, 1 << 16} {
		v.Devices[nic].Together = slices.Repeat([]string{nic}, n)
		all, err := d.HotResetInfo()
		if len(all) != n || err != nil || !all[n-1].Owned || all[n-1].Address.String() != nic {
			t.Errorf("%d of %d, %v", len(all), n, err)
		}
	}

	v.Devices[nic].Together = slices.Repeat([]string{nic}, 1<<16+1)
	if all, err := d.HotResetInfo(); all != nil || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%d, %v", len(all), err)
	}
	if err := d.HotReset(); !errors.Is(err, unix.ENOSPC) || v.Devices[nic].Resets != 0 {
		t.Error(err)
	}

	v.Devices[nic].Together = []string{nic, "0001:ff:1f.7"}
	want := iommu.Address{Domain: 1, Bus: 0xff, Device: 0x1f, Function: 7}
	if all, err := d.HotResetInfo(); err != nil || len(all) != 2 || all[1] != (Dependent{want, false}) {
		t.Errorf("%+v, %v", all, err)
	}

	// A group that two of them are in is given once, and what the kernel then refuses stays its own word.
	v.Devices[nic].Together = []string{nic, nic}
	v.Fail = failing(0x3b71, unix.EINVAL)
	if err := d.HotReset(); !errors.Is(err, unix.EINVAL) || errors.Is(err, ErrNotOwned) {
		t.Error(err)
	}

	for count, ok := range map[uint32]bool{0: true, 1: true, 2: false} {
		_, all, err := decodeHotReset(words(20, 3, count, 9, 0x08000000))
		if (err == nil) != ok || ok && len(all) != int(count) {
			t.Errorf("%d in the room for one: %v, %v", count, all, err)
		}
	}

	flags, all, err := decodeHotReset(words(20, 3, 1, 9, 0x08070001))
	if err != nil || flags != 3 || all[0].GroupId != 9 {
		t.Errorf("%d, %+v, %v", flags, all, err)
	}
}

// TestGroupsTogether resets functions of several groups: the kernel is given each group once.
func TestGroupsTogether(t *testing.T) {
	const one, two = "0000:07:01.0", "0000:07:02.0"
	eachWay(t, func(t *testing.T, way Way) {
		k := hosttest.NewSmallLab(t, "0000:00:08.0", one, two, "0000:00:05.0", nic)
		v := k.ServeVFIO()
		for _, a := range []string{one, two, nic} {
			takeFor(t, k, a)
			v.Devices[a] = &hosttest.VFIODevice{Together: []string{one, nic, two}}
		}
		c := newContext(t, &iommu.Host{Host: k.Host()}, Options{Way: way})
		d := must2(c.Open(one))(t)
		owned, ok := errors.AsType[*NotOwnedError](d.HotReset())
		if !ok || owned.Device != one || len(owned.Members) != 1 || owned.Members[0].String() != nic {
			t.Errorf("%+v", owned)
		}
		must2(c.Open(nic))(t)
		err := d.HotReset()
		for _, a := range []string{one, two, nic} {
			if v.Devices[a].Resets != 1 {
				t.Errorf("%s was reset %d times: %v", a, v.Devices[a].Resets, err)
			}
		}
	})
}

// TestSized asks again with the room that an answer takes, and not for more than is sensible.
func TestSized(t *testing.T) {
	_, v, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	for _, n := range []int{0, 1, 100, (maxInfo - 48) / 16} {
		v.Devices[nic].Regions[BAR0], v.Devices[nic].Sparse = 1<<30, [][2]uint64{}
		for i := range n {
			v.Devices[nic].Sparse = append(v.Devices[nic].Sparse, [2]uint64{uint64(i) << 12, 4096})
		}
		if r, err := d.Region(BAR0); err != nil || len(r.Mappable) != n {
			t.Errorf("%d areas: %v", n, err)
		}
	}

	v.Devices[nic].Sparse = append(v.Devices[nic].Sparse, [2]uint64{1 << 29, 4096})
	if _, err := d.Region(BAR0); err == nil || !strings.Contains(err.Error(), "too much") {
		t.Errorf("more than that: %v", err)
	}

	v.Devices[nic].Sparse = [][2]uint64{{1 << 30, 4096}}
	if _, err := d.Region(BAR0); err == nil || !strings.Contains(err.Error(), nic+": region 0") {
		t.Errorf("an area beyond the end: %v", err)
	}

	for way, most := range map[Way]int{IOMMUFD: 1 << 16, Container: (maxInfo - 24 - 16 - 12) / 16} {
		c, _ := openOne(t, host, Options{Way: way}, other)
		for _, n := range []int{1, 15, 16, 17, most, most + 1} {
			v.Allowed = nil
			for i := range uint64(n) {
				v.Allowed = append(v.Allowed, [2]uint64{i << 13, i<<13 + 4095})
			}
			info, err := c.Info()
			if (err == nil) != (n <= most) || err == nil && len(info.Ranges) != n {
				t.Errorf("by %s, %d ranges: %d, %v", way, n, len(info.Ranges), err)
			}
			if last := uint64(n-1) << 13; err == nil && info.Ranges[n-1] != (Range{last, last + 4095}) {
				t.Errorf("by %s, the last of %d ranges is %s", way, n, info.Ranges[n-1])
			}
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestSetToken sets a PF's token, which its VF's user gives, and decodes tokens.
func TestSetToken(t *testing.T) {
	_, v, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	token := NewToken()
	if err := d.SetToken(token); !errors.Is(err, ErrUnsupported) {
		t.Errorf("no PF: %v", err)
	}

	v.Devices[nic].PF = true
	if err := d.SetToken(token); err != nil || v.Devices[nic].Token != token.String() {
		t.Errorf("%v, %s, not %s", err, v.Devices[nic].Token, token)
	}

	// All of its bits are random, but those that say that it is.
	var ever, always Token
	for i := range 100 {
		token := NewToken()
		for n := range token {
			ever[n] |= token[n]
			always[n] &= token[n]
			if i == 0 {
				always[n] = token[n]
			}
		}
		text := token.String()
		if text[14] != '4' || !strings.ContainsRune("89ab", rune(text[19])) || len(text) != 36 {
			t.Errorf("%s is no random UUID", text)
		}
		for _, text := range []string{text, strings.ToUpper(text)} {
			if again, err := ParseToken(text); err != nil || again != token {
				t.Errorf("%s, %v", again, err)
			}
		}
	}

	set, all := Token{6: 0x40, 8: 0x80}, Token(bytes.Repeat([]byte{0xff}, 16))
	all[6], all[8] = 0x4f, 0xbf
	if always != set || ever != all {
		t.Errorf("of a hundred tokens each has %x, and none more than %x", always, ever)
	}

	counting := Token{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	const text = "00010203-0405-0607-0809-0a0b0c0d0e0f"
	if again, err := ParseToken(text); again != counting || err != nil || counting.String() != text {
		t.Errorf("%s, %s, %v", counting, again, err)
	}

	for _, wrong := range []string{text + "00", text[:34], "g" + text[1:], "0-0010203-0405-0607-0809-0a0b0c0d0e0f"} {
		if got, err := ParseToken(wrong); err == nil || got != (Token{}) {
			t.Errorf("%q is token %s", wrong, got)
		}
	}
}

// TestHardwareBounds decodes each register of each kind of IOMMU, and answers that are too short for them.
func TestHardwareBounds(t *testing.T) {
	numbers := words(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
	two := func(low, high uint64) uint64 { return high<<32 | low }
	for _, c := range []struct {
		kind, capabilities uint32
		size               int
		want               Hardware
	}{
		{1, 0, 24, Hardware{VTd: &VTdInfo{two(3, 4), two(5, 6)}}},
		{2, 1, 40, Hardware{DirtyTracking: true, SMMU: &SMMUInfo{[6]uint32{3, 4, 5, 6, 7, 8}, 9, 10}}},
		{4, 2, 16, Hardware{AMD: &AMDInfo{two(1, 2), two(3, 4)}}},
		{0, 3, 0, Hardware{DirtyTracking: true}}, {3, 0, 0, Hardware{}}, {5, 0, 0, Hardware{}},
	} {
		got, err := decodeHardware(c.kind, uint64(c.capabilities), numbers[:c.size])
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("kind %d: %+v, %v", c.kind, got, err)
		}
		if c.size == 0 {
			continue
		}
		if got, err := decodeHardware(c.kind, 0, numbers[:c.size-1]); err == nil || got != (Hardware{}) {
			t.Errorf("kind %d, too short: %+v, %v", c.kind, got, err)
		}
	}

	for oas, want := range []int{32, 36, 40, 42, 44, 48, 52, 56} {
		for _, others := range []uint32{0, 0xfffffff8} {
			if got := (SMMUInfo{IDR: [6]uint32{5: uint32(oas) | others}}).Width(); got != want {
				t.Errorf("%d: %d bits", oas, got)
			}
		}
	}

	for mgaw, want := range map[uint64]int{0: 1, 38: 39, 63: 64} {
		for _, others := range []uint64{0, ^uint64(0x3f << 16)} {
			if got := (VTdInfo{Capability: mgaw<<16 | others}).Width(); got != want {
				t.Errorf("%d: %d bits", mgaw, got)
			}
		}
	}

	_, v, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	// A kernel that has more to say than there is room for.
	v.Hardware, v.Info = 2, append(slices.Clone(numbers), make([]byte, 100)...)
	if hw, err := d.Hardware(); err != nil || hw.SMMU == nil || hw.SMMU.AIDR != 10 || hw.DirtyTracking {
		t.Errorf("%+v, %v", hw, err)
	}

	_, d = openOne(t, host, Options{Way: Container}, other)
	if _, err := d.Hardware(); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}
