package hosttest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// VFIO answers what is asked of VFIO's and iommufd's nodes, as drivers/vfio and drivers/iommu/iommufd of Linux 6.12 do,
// errnos included. The files that it gives are memory, so that they can be read, written and mapped: a device's region
// of an index begins at that times 1<<40, as with vfio-pci. Offsets within structures are written here a second time,
// from the C headers.
type VFIO struct {
	Isolated bool                   // interrupts are kept apart
	Dirty    bool                   // the IOMMU can note what is written to
	Version  int                    // of VFIO, which containers tell
	NoType1  bool                   // vfio_iommu_type1 is not there
	Unviable bool                   // no group is viable, whatever drivers have its devices
	Hardware uint32                 // its type for IOMMU_GET_HW_INFO, and what is told of it
	Info     []byte                 // of that
	Allowed  [][2]uint64            // IOVA ranges, the last one included
	Devices  map[string]*VFIODevice // by address
	Fail     func(request uintptr) error
	Requests []uintptr // the ioctls, in their order

	k     *Kernel
	mu    sync.Mutex
	files map[string]*vfioFile // by the name of their memory
	byFD  map[int]string
}

// VFIODevice is what a device on a VFIO driver can do.
type VFIODevice struct {
	Regions   [9]uint64        // sizes
	Sparse    [][2]uint64      // of BAR 0: offset and size; nil: all can be mapped
	Vectors   [5]uint32        // by kind
	Vacant    int              // how many of them the host has left; 0: all
	NoReset   bool             // it cannot be reset alone
	Dies      bool             // a reset leaves it dead
	Together  []string         // what a hot reset resets
	Migration uint64           // flags; 0: it cannot be migrated
	Log       bool             // it can note what it writes to
	Logs      [][2]uint64      // what it notes that of now: the size of pages, then offsets and sizes
	Token     string           // a VF token that has to be given
	PF        bool             // it can be given a token, which it has then
	Sleeps    bool             // it can be put into a state of low power
	Asleep    bool             // it is in that
	Wakes     []int            // eventfds of who wants to know that it was woken
	State     uint32           // of migration
	Content   []byte           // what is saved and loaded
	Rest      []byte           // what of that is there only when it has stopped
	Changed   uint64           // what has changed of it since it was read, in bytes
	Full      bool             // what is written to it fails
	Resets    int              // how often it was reset
	Written   []uint64         // what it or the IOMMU has noted, by IOVA
	Events    map[uint32][]int // eventfds that are enabled, by kind
}

type vfioFile struct {
	kind string // container, group, device, iommufd, data
	name string // a group's number, a device's address
	// of a container or iommufd
	maps  map[uint64]uint64 // size by IOVA
	mayOf map[uint64]uint32 // access by IOVA: 1 read, 2 write
	set   bool              // its IOMMU is set
	ids   uint32
	track map[uint32]bool // by page table
	// of a group: the container's memory. Of a device: that of the group or iommufd it is bound to.
	in       string
	attached bool
	load     bool // of data, whose name is the device's: it is written to
}

// bytes of an argument.
type vfioArg []byte

func (a vfioArg) u32(at int) uint32          { return binary.NativeEndian.Uint32(a[at:]) }
func (a vfioArg) u64(at int) uint64          { return binary.NativeEndian.Uint64(a[at:]) }
func (a vfioArg) put32(at int, v uint32)     { binary.NativeEndian.PutUint32(a[at:], v) }
func (a vfioArg) put64(at int, v uint64)     { binary.NativeEndian.PutUint64(a[at:], v) }
func memory(address uint64, size int) []byte { return unsafe.Slice((*byte)(pointerTo(address)), size) }

// pointerTo is what an address that came from the caller points to.
func pointerTo(address uint64) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&address)) }

// ServeVFIO gives a kernel VFIO, with both ways in.
func (k *Kernel) ServeVFIO() *VFIO {
	k.put("dev/vfio/vfio", "c 10:196\n")
	k.put("dev/iommu", "c 10:126\n")
	return k.opened
}

// startVFIO has the nodes of groups and devices opened, once as the kernel does.
func (k *Kernel) startVFIO() {
	k.opened = &VFIO{
		Isolated: true, Allowed: [][2]uint64{{0, 0xfedfffff}, {0xfef00000, 1<<48 - 1}},
		Devices: map[string]*VFIODevice{}, k: k, files: map[string]*vfioFile{}, byFD: map[int]string{},
	}
	k.OnOpen, k.OnIoctl = k.opened.open, k.opened.ioctl
}

// awaitClosed waits before a VFIO driver is unbound until nobody has the device's own file open, bound to an iommufd or
// not (vfio_unregister_group_dev).
func (k *Kernel) awaitClosed(name, address string) {
	driver := path.Base(path.Dir(name))
	if path.Base(name) != "unbind" || !strings.Contains(driver, "vfio") {
		return
	}
	for k.opened.has(strings.TrimSpace(address)) {
		time.Sleep(time.Millisecond) // nothing tells of another's close
	}
}

func (v *VFIO) has(address string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.opened("device", address)) > 0
}

// numbered are the open files of all kernels of a process, none of which is taken for another's.
var numbered atomic.Int64

// file makes memory for an open file.
func (v *VFIO) file(f *vfioFile) (int, error) {
	name := "vfio-" + strconv.FormatInt(numbered.Add(1), 10)
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return -1, err
	}
	if f.kind == "device" {
		if err := unix.Ftruncate(fd, 9<<40); err != nil {
			return -1, err
		}
	}
	f.maps, f.mayOf, f.track = map[uint64]uint64{}, map[uint64]uint32{}, map[uint32]bool{}
	v.files[name], v.byFD[fd] = f, name
	return fd, nil
}

// alive reports whether a file is still open.
func (v *VFIO) alive(name string) bool {
	for fd, n := range v.byFD {
		if n != name {
			continue
		}
		if at, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); err == nil && strings.HasPrefix(at,
			"/memfd:"+name+" ") {
			return true
		}
		delete(v.byFD, fd)
	}
	delete(v.files, name)
	return false
}

// opened are the open files of a kind.
func (v *VFIO) opened(kind, name string) []*vfioFile {
	var out []*vfioFile
	for memory, f := range v.files {
		if f.kind == kind && (name == "" || f.name == name) && v.alive(memory) {
			out = append(out, f)
		}
	}
	return out
}

func (v *VFIO) group(address string) string {
	target, _ := os.Readlink(v.k.at(path.Join(sysDevices, address, "iommu_group")))
	return path.Base(target)
}

// viable reports whether no driver of the host has a device of a group.
func (v *VFIO) viable(group string) bool {
	if v.Unviable {
		return false
	}
	for _, address := range v.k.names(path.Join(sysGroups, group, "devices")) {
		driver := v.k.driver(v.k.device(address))
		class := v.k.text(v.k.device(address), "class")
		if driver != "" && !strings.Contains(driver, "vfio") && !strings.HasPrefix(class, "0x0604") {
			return false
		}
	}
	return true
}

func (v *VFIO) open(name string) (int, bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var f *vfioFile
	dir, base := path.Split(name)
	switch {
	case name == "dev/vfio/vfio":
		f = &vfioFile{kind: "container"}
	case name == "dev/iommu":
		f = &vfioFile{kind: "iommufd", ids: 1}
	case dir == "dev/vfio/":
		f = &vfioFile{kind: "group", name: base}
		busy := len(v.opened("group", base)) > 0
		for _, d := range v.opened("device", "") {
			// A device that was opened by its group keeps that open.
			busy = busy || d.in != "" && v.group(d.name) == strings.TrimPrefix(base, "noiommu-")
		}
		if busy {
			return -1, true, unix.EBUSY
		}
	case dir == "dev/vfio/devices/":
		for _, address := range v.k.names(sysDevices) {
			if v.k.exists(path.Join(v.k.device(address), "vfio-dev", base)) {
				f = &vfioFile{kind: "device", name: address}
			}
		}
	}

	if f == nil {
		return -1, false, nil
	}

	fd, err := v.file(f)
	return fd, true, err
}

// bound reports whether a device is bound to an iommufd.
func (v *VFIO) bound(d *vfioFile) bool {
	to := v.files[d.in]
	return to != nil && to.kind == "iommufd"
}

func (v *VFIO) of(fd int) (string, *vfioFile) {
	name := v.byFD[fd]
	if name == "" || !v.alive(name) {
		return "", nil
	}
	return name, v.files[name]
}

// The ioctls by their numbers in linux/vfio.h and linux/iommufd.h.
func (v *VFIO) ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.Requests = append(v.Requests, request)
	if v.Fail != nil {
		if err := v.Fail(request); err != nil {
			return 0, err
		}
	}

	name, f := v.of(fd)
	if f == nil {
		return 0, unix.EBADF
	}

	word := *(*uint32)(arg)
	sized := func() vfioArg { return unsafe.Slice((*byte)(arg), word) }
	number := request - ';'<<8
	switch {
	case f.kind == "container" && number <= 102:
		return v.containerValue(name, f, number, *(*uintptr)(arg))
	case f.kind == "container":
		return 0, v.container(f, number, sized())
	case f.kind == "group" && number == 103:
		a := sized()
		a.put32(4, map[bool]uint32{true: 1}[v.viable(f.name)])
		return 0, nil
	case f.kind == "group":
		return v.groupRequest(name, f, number, arg)
	case f.kind == "iommufd":
		return 0, v.iommufd(f, number, sized())
	case f.kind == "device" && number == 111:
		return 0, v.reset(f.name)
	case f.kind == "device":
		return v.device(f, number, sized())
	case f.kind == "data" && number == 121:
		return 0, v.preCopy(fd, f, sized())
	}

	return 0, unix.ENOTTY
}

func (v *VFIO) containerValue(name string, c *vfioFile, number, value uintptr) (int, error) {
	switch number {
	case 100:
		return v.Version, nil
	case 101:
		return map[bool]int{true: 1}[value == 3 && !v.NoType1], nil
	case 102:
		any := false
		for _, g := range v.opened("group", "") {
			any = any || g.in == name
		}
		switch {
		case !any || c.set:
			return 0, unix.EINVAL
		case !v.Isolated:
			return 0, unix.EPERM
		}
		c.set = true
		return 0, nil
	}
	return 0, unix.ENOTTY
}

func (v *VFIO) container(c *vfioFile, number uintptr, a vfioArg) error {
	if !c.set {
		return unix.EINVAL
	}

	switch number {
	case 112: // GET_INFO
		ranges := uint32(16 + 16*len(v.Allowed))
		need := 24 + ranges + 12
		a.put32(4, 3)
		a.put64(8, 0x40201000)
		a.put32(16, 0)
		if uint32(len(a)) < need {
			a.put32(0, need)
			return nil
		}
		a.put32(16, 24)
		binary.NativeEndian.PutUint16(a[24:], 1)
		a.put32(28, 24+ranges)
		a.put32(32, uint32(len(v.Allowed)))
		for i, r := range v.Allowed {
			a.put64(40+16*i, r[0])
			a.put64(48+16*i, r[1])
		}
		binary.NativeEndian.PutUint16(a[24+ranges:], 3)
		a.put32(int(24+ranges)+4, 0)
		a.put32(int(24+ranges)+8, 65535-uint32(len(c.maps)))
		return nil
	case 113:
		c.mayOf[a.u64(16)] = a.u32(4)
		return v.mapAt(c, a.u64(16), a.u64(24), unix.EEXIST, unix.EINVAL)
	case 114:
		size, there := c.maps[a.u64(8)]
		if !there || size != a.u64(16) {
			a.put64(16, 0)
			return nil
		}
		delete(c.maps, a.u64(8))
		return nil
	}

	return unix.ENOTTY
}

// Access is what devices may do with what is mapped at an address: 1 read, 2 write.
func (v *VFIO) Access(iova uint64) uint32 {
	v.mu.Lock()
	defer v.mu.Unlock()
	may := uint32(0)
	for _, f := range v.files {
		if _, mapped := f.maps[iova]; mapped {
			may |= f.mayOf[iova]
		}
	}
	return may
}

func (v *VFIO) mapAt(c *vfioFile, iova, size uint64, exists, reserved error) error {
	allowed := slices.ContainsFunc(v.Allowed, func(r [2]uint64) bool { return r[0] <= iova && iova+size-1 <= r[1] })
	if !allowed || iova%4096 != 0 || size%4096 != 0 || size == 0 {
		return reserved
	}
	for i, s := range c.maps {
		if iova < i+s && i < iova+size {
			return exists
		}
	}
	c.maps[iova] = size
	return nil
}

func (v *VFIO) groupRequest(name string, g *vfioFile, number uintptr, arg unsafe.Pointer) (int, error) {
	switch number {
	case 104:
		to, c := v.of(int(*(*int32)(arg)))
		switch {
		case c == nil:
			return 0, unix.EBADFD
		case g.in != "":
			return 0, unix.EINVAL
		case !v.viable(g.name):
			return 0, unix.EPERM
		}
		g.in = to
	case 105:
		g.in = ""
	case 106:
		var text []byte
		for p := (*byte)(arg); *p != 0; p = (*byte)(unsafe.Add(unsafe.Pointer(p), 1)) {
			text = append(text, *p)
		}
		address, token, given := strings.Cut(string(text), " vf_token=")
		d := v.Devices[address]
		switch {
		case d == nil || v.group(address) != g.name || !strings.Contains(v.k.driver(v.k.device(address)), "vfio"):
			return 0, unix.ENODEV
		case g.in == "" || !v.files[g.in].set || given && d.Token == "":
			return 0, unix.EINVAL
		case token != d.Token:
			return 0, unix.EACCES
		}
		return v.file(&vfioFile{kind: "device", name: address, in: name, attached: true})
	}

	return 0, nil
}

func (v *VFIO) iommufd(f *vfioFile, number uintptr, a vfioArg) error {
	id := func() uint32 { f.ids++; return f.ids }
	switch number {
	case 128, 139: // DESTROY, HWPT_SET_DIRTY_TRACKING
		if number == 139 {
			f.track[a.u32(8)] = a.u32(4) == 1
		}
	case 129:
		a.put32(8, id())
	case 132: // IOAS_IOVA_RANGES
		room := a.u32(8)
		a.put32(8, uint32(len(v.Allowed)))
		a.put64(24, 4096)
		if int(room) < len(v.Allowed) {
			return unix.EMSGSIZE
		}
		out := vfioArg(memory(a.u64(16), 16*int(room)))
		for i, r := range v.Allowed {
			out.put64(16*i, r[0])
			out.put64(16*i+8, r[1])
		}
	case 133:
		f.mayOf[a.u64(32)] = a.u32(4)>>2&1 | a.u32(4)&2
		return v.mapAt(f, a.u64(32), a.u64(24), unix.EADDRINUSE, unix.EADDRINUSE)
	case 134:
		if f.maps[a.u64(8)] != a.u64(16) {
			return unix.ENOENT
		}
		delete(f.maps, a.u64(8))
	case 137: // HWPT_ALLOC
		if a.u32(4)&2 != 0 && !v.Dirty {
			return unix.EOPNOTSUPP
		}
		a.put32(16, id())
	case 138: // GET_HW_INFO
		n := min(int(a.u32(12)), len(v.Info))
		copy(memory(a.u64(16), n), v.Info)
		a.put32(12, uint32(len(v.Info)))
		a.put32(24, v.Hardware)
		a.put64(32, map[bool]uint64{true: 1}[v.Dirty])
	case 140: // HWPT_GET_DIRTY_BITMAP
		if !f.track[a.u32(4)] {
			return unix.EINVAL
		}
		v.report(a.u64(16), a.u64(24), a.u64(32), a.u64(40), a.u32(8)&1 != 0)
	default:
		return unix.ENOTTY
	}

	return nil
}

// report sets the bits of what was written to in a bitmap.
func (v *VFIO) report(iova, length, page, bitmap uint64, keep bool) {
	for _, d := range v.Devices {
		d.Written = slices.DeleteFunc(d.Written, func(at uint64) bool {
			if at < iova || at >= iova+length {
				return false
			}
			n := (at - iova) / page
			memory(bitmap, int(length/page+7)/8)[n/8] |= 1 << (n % 8)
			return !keep
		})
	}
}

func (v *VFIO) device(f *vfioFile, number uintptr, a vfioArg) (int, error) {
	d := v.Devices[f.name]
	if d == nil {
		return 0, unix.ENODEV
	}

	switch {
	case number == 118:
		return 0, v.bind(f, a)
	case f.in == "":
		return 0, unix.EINVAL
	case number == 119:
		f.attached = true
		return 0, nil
	case number == 107:
		flags := uint32(2)
		if !d.NoReset {
			flags |= 1
		}
		a.put32(4, flags)
		a.put32(8, 9)
		a.put32(12, 5)
		return 0, nil
	case number == 108:
		return 0, d.region(a)
	case number == 109:
		if a.u32(8) >= 5 {
			return 0, unix.EINVAL
		}
		a.put32(4, map[bool]uint32{true: 1 | 2 | 4, false: 1 | 8}[a.u32(8) == 0])
		a.put32(12, d.Vectors[a.u32(8)])
		return 0, nil
	case number == 110:
		return d.irqs(a)
	case number == 112:
		return 0, v.hotInfo(f, d, a)
	case number == 113:
		return 0, v.hotReset(f, d, a)
	case number == 117:
		return 0, v.feature(f, d, a)
	}

	return 0, unix.ENOTTY
}

func (v *VFIO) bind(f *vfioFile, a vfioArg) error {
	to, c := v.of(int(int32(a.u32(8))))
	if c == nil {
		return unix.EBADFD
	}
	if a.u32(4) != 0 {
		return unix.EINVAL // tokens came with Linux 6.17
	}
	if len(v.opened("group", v.group(f.name))) > 0 {
		return unix.EBUSY
	}
	for _, other := range v.opened("device", "") {
		switch {
		case other != f && other.name == f.name && other.in != "":
			return unix.EINVAL
		case other != f && other.in != "" && other.in != to && v.group(other.name) == v.group(f.name):
			return unix.EPERM
		}
	}
	if !v.Isolated || !v.viable(v.group(f.name)) {
		return unix.EPERM
	}
	f.in = to
	c.ids++
	a.put32(12, c.ids)
	return nil
}

func (v *VFIO) reset(address string) error {
	d := v.Devices[address]
	if d == nil || d.NoReset {
		return unix.EINVAL
	}
	d.Resets++
	d.State = 2
	if d.Dies {
		for name, f := range v.files {
			if f.kind == "device" && f.name == address && v.alive(name) {
				return v.kill(name)
			}
		}
	}
	return nil
}

// kill has a device's configuration space read as all ones.
func (v *VFIO) kill(name string) error {
	f, err := os.OpenFile(v.pathOf(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(bytes.Repeat([]byte{0xff}, 64), 7<<40)
	return err
}

func (d *VFIODevice) region(a vfioArg) error {
	i := a.u32(8)
	if i >= 9 || i == 8 && d.Regions[8] == 0 {
		return unix.EINVAL
	}

	a.put64(16, d.Regions[i])
	a.put64(24, uint64(i)<<40)
	a.put32(12, 0)
	flags := uint32(3)
	if i < 6 {
		flags |= 4
	}

	if i == 0 && d.Sparse != nil {
		flags |= 8
		need := 32 + 16 + 16*len(d.Sparse)
		if len(a) < need {
			a.put32(0, uint32(need))
		} else {
			a.put32(12, 32)
			binary.NativeEndian.PutUint16(a[32:], 1)
			a.put32(36, 0)
			a.put32(40, uint32(len(d.Sparse)))
			for n, area := range d.Sparse {
				a.put64(48+16*n, area[0])
				a.put64(56+16*n, area[1])
			}
		}
	}

	a.put32(4, flags)
	return nil
}

func (d *VFIODevice) irqs(a vfioArg) (int, error) {
	flags, kind, start, count := a.u32(4), a.u32(8), a.u32(12), a.u32(16)
	if kind >= 5 || start >= d.Vectors[kind] || count > d.Vectors[kind]-start {
		return 0, unix.EINVAL
	}
	if d.Events == nil {
		d.Events = map[uint32][]int{}
	}

	switch {
	case flags == 0x21 && count == 0:
		delete(d.Events, kind)
	case flags == 0x24 && d.Vacant > 0 && int(count) > d.Vacant:
		return d.Vacant, nil
	case flags == 0x24:
		for n := range count {
			d.Events[kind] = append(d.Events[kind], int(a.u32(20+4*int(n))))
		}
	case flags == 0x21:
		if int(start+count) > len(d.Events[kind]) {
			return 0, unix.EINVAL
		}
		for _, fd := range d.Events[kind][start : start+count] {
			if _, err := unix.Write(fd, binary.NativeEndian.AppendUint64(nil, 1)); err != nil {
				return 0, err
			}
		}
	case kind != 0:
		return 0, unix.EINVAL
	}

	return 0, nil
}

func (v *VFIO) hotInfo(f *vfioFile, d *VFIODevice, a vfioArg) error {
	if len(d.Together) == 0 {
		return unix.ENODEV
	}

	cdev := v.bound(f)
	a.put32(4, map[bool]uint32{true: 3}[cdev])
	a.put32(8, uint32(len(d.Together)))
	if len(a) < 12+8*len(d.Together) {
		return unix.ENOSPC
	}

	for i, address := range d.Together {
		var domain, bus, dev, fn uint32
		if _, err := fmt.Sscanf(address, "%04x:%02x:%02x.%d", &domain, &bus, &dev, &fn); err != nil {
			return unix.EINVAL
		}
		id := ^uint32(0)
		if cdev {
			for _, o := range v.opened("device", address) {
				if o.in == f.in {
					id = 1
				}
			}
			if id != 1 && v.group(address) == v.group(f.name) {
				id = 0
			}
		} else {
			n, _ := strconv.Atoi(v.group(address))
			id = uint32(n)
		}
		a.put32(12+8*i, id)
		binary.NativeEndian.PutUint16(a[16+8*i:], uint16(domain))
		a[18+8*i], a[19+8*i] = byte(bus), byte(dev<<3|fn)
	}

	return nil
}

// hotReset answers VFIO_DEVICE_PCI_HOT_RESET, which takes the descriptors of all groups that are reset, each once; by
// iommufd it takes none.
func (v *VFIO) hotReset(f *vfioFile, d *VFIODevice, a vfioArg) error {
	given := map[string]bool{}
	for i := range int(a.u32(8)) {
		_, g := v.of(int(a.u32(12 + 4*i)))
		if g == nil || g.kind != "group" || given[g.name] {
			return unix.EINVAL
		}
		given[g.name] = true
	}
	if v.bound(f) != (len(given) == 0) {
		return unix.EINVAL
	}
	for _, address := range d.Together {
		// vfio_pci_dev_set_resettable: all that is on the bus has to be on a VFIO driver.
		if !v.bound(f) && !given[v.group(address)] || !strings.Contains(v.k.driver(v.k.device(address)), "vfio") {
			return unix.EINVAL
		}
	}
	for _, address := range d.Together {
		v.Devices[address].Resets++
	}
	return nil
}

// feature answers VFIO_DEVICE_FEATURE.
func (v *VFIO) feature(f *vfioFile, d *VFIODevice, a vfioArg) error {
	flags := a.u32(4)
	probe := flags&(1<<18) != 0
	has := map[uint32]bool{
		0: d.PF, 1: d.Migration != 0, 2: d.Migration != 0, 3: d.Sleeps, 4: d.Sleeps, 5: d.Sleeps, 6: d.Log, 7: d.Log,
		8: d.Log, 9: d.Migration != 0,
	}

	n := flags & 0xffff
	if !has[n] {
		return unix.ENOTTY
	}
	if probe {
		return nil
	}

	switch n {
	case 0:
		t := fmt.Sprintf("%x", a[8:24])
		d.Token = strings.Join([]string{t[:8], t[8:12], t[12:16], t[16:20], t[20:]}, "-")
	case 1:
		a.put64(8, d.Migration)
	case 2:
		if flags&(1<<16) != 0 {
			a.put32(8, d.State)
			return nil
		}
		return v.setState(f, d, a)
	case 3, 4:
		if d.Asleep {
			return unix.EINVAL
		}
		d.Asleep = true
		if n == 4 {
			d.Wakes = append(d.Wakes, int(a.u32(8)))
		}
	case 5:
		d.Asleep, d.Wakes = false, nil
	case 6:
		d.Logs = [][2]uint64{{a.u64(8)}}
		ranges := vfioArg(memory(a.u64(24), 16*int(a.u32(16))))
		for i := range int(a.u32(16)) {
			d.Logs = append(d.Logs, [2]uint64{ranges.u64(16 * i), ranges.u64(16*i + 8)})
		}
	case 7:
		d.Logs = nil
	case 8:
		v.report(a.u64(8), a.u64(16), a.u64(24), a.u64(32), false)
	case 9:
		a.put64(8, uint64(len(d.Content)))
	}

	return nil
}

// setState goes to a state at once; leaving RESUMING takes what was written, which must be as long as what there is.
func (v *VFIO) setState(f *vfioFile, d *VFIODevice, a vfioArg) error {
	to := a.u32(8)
	a.put32(12, ^uint32(0))
	p2p, preCopy := to == 5 || to == 7, to == 6 || to == 7
	if to == 0 || to > 7 || d.State == 0 || p2p && d.Migration&2 == 0 || preCopy && d.Migration&4 == 0 {
		return unix.EINVAL
	}

	if d.State == 4 && to != 4 {
		for name, f := range v.files {
			if f.kind != "data" || !f.load {
				continue
			}
			b, err := os.ReadFile(v.pathOf(name))
			if err != nil || len(b) != len(d.Content) {
				d.State = 0
				return unix.EINVAL
			}
			d.Content = b
		}
	}

	if to == 4 && d.State != 4 && d.Full {
		fd, err := unix.Open("/dev/full", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		a.put32(12, uint32(fd))
		d.State = to
		return err
	}

	saves := func(state uint32) bool { return state == 3 || state >= 6 }
	if saves(to) && !saves(d.State) || to == 4 && d.State != 4 {
		fd, err := v.file(&vfioFile{kind: "data", name: f.name, load: to == 4})
		if err != nil {
			return err
		}
		if to != 4 {
			if _, err := unix.Pwrite(fd, d.Content, 0); err != nil {
				return err
			}
		}
		a.put32(12, uint32(fd))
	}

	if to == 3 && d.State != 3 {
		if err := v.stopped(f.name, d); err != nil {
			return err
		}
	}

	d.State = to
	return nil
}

// stopped adds to the state that is read of a device what is there only now.
func (v *VFIO) stopped(address string, d *VFIODevice) error {
	for fd, name := range v.byFD {
		if f := v.files[name]; f != nil && f.kind == "data" && f.name == address && v.alive(name) {
			_, err := unix.Pwrite(fd, d.Rest, int64(len(d.Content)))
			return err
		}
	}
	return nil
}

// preCopy answers VFIO_MIG_GET_PRECOPY_INFO.
func (v *VFIO) preCopy(fd int, f *vfioFile, a vfioArg) error {
	d := v.Devices[f.name]
	if d.State < 6 {
		return unix.EINVAL
	}
	read, err := unix.Seek(fd, 0, unix.SEEK_CUR)
	a.put64(8, uint64(len(d.Content))-uint64(read))
	a.put64(16, d.Changed)
	return err
}

// Tracking is how many page tables note what is written to.
func (v *VFIO) Tracking() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	n := 0
	for _, f := range v.files {
		for _, on := range f.track {
			if on {
				n++
			}
		}
	}
	return n
}

func (v *VFIO) pathOf(name string) string {
	for fd, n := range v.byFD {
		if n == name && v.alive(name) {
			return "/proc/self/fd/" + strconv.Itoa(fd)
		}
	}
	return ""
}
