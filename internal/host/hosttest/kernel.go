package hosttest

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	"viaduct/internal/host"
)

// Kernel is a fake of a running host: a folder that answers writes the way drivers/base/bus.c, drivers/pci/pci-sysfs.c,
// pci-driver.c and iov.c do, errnos included, and a system that answers netlink, ioctls and modprobe. Where it does not
// know a file it refuses the write, as the kernel does for read-only attributes (EACCES). Drivers with "vfio" in their
// names match by driver_override only and make no VFs.
//
// Its fields may be set before the first operation, and by After.
type Kernel struct {
	IDs     map[string][]string // by driver: the "vvvv:dddd" that it matches without an override
	Modules map[string]string   // by module or alias that modprobe loads: the driver it brings, "" if it fails
	Hang    map[string]bool     // modules whose modprobe lasts until it is given up
	Fail    map[string]error    // by file name as it is written to: answer this, and do nothing
	Probe   map[string]error    // by device or driver: probing fails with this
	Partial int                 // make at most so many VFs and report success, if not 0
	// OnIoctl answers ioctl(2). NewKernel has VFIO's files answer.
	OnIoctl func(fd int, request uintptr, arg unsafe.Pointer) (int, error)
	// OnOpen opens those files that it knows, which are there. NewKernel has VFIO's nodes opened.
	OnOpen func(name string) (fd int, known bool, err error)
	// LateGroups are, by device, the IOMMU groups that devices without one get when a driver is first bound, as with an
	// SMMU; "noiommu-N" for one that VFIO makes in its noiommu mode.
	LateGroups map[string]string
	// EnableSRIOV has vfio-pci make VFs, as with enable_sriov=1, which it takes at once.
	EnableSRIOV bool
	ResetVFs    bool                     // each VF can be reset by itself
	Log         []string                 // every write in its order, also those that failed: "name=value"
	Before      func(name, value string) // called before each write, without the lock
	// After is called after each write, without the lock; it may call Write, which calls it again.
	After  func(name, value string)
	Busy   map[string]bool       // disks that are in exclusive use, by name
	Owners map[string]host.Owner // of nodes, by name, as Own set them
	Net    Network               // what netlink answers from, beside the interfaces that the files show

	opened *VFIO // what was opened of VFIO's nodes

	tb   testing.TB
	dir  string // of sysfs and all: the root
	host *host.Host

	mu      sync.Mutex
	home    map[string]Tree // by device and driver: what the driver had made of the device when it was unbound
	classes map[string]Tree // the same, of /sys/class
	vfio    int
	fault   atomic.Pointer[Fault] // asked before each operation
	killed  atomic.Bool           // an operation failed for KillAt or FailAt
}

// Fault decides which operation of a host fails, and with what: nil lets it be. It may be called from any goroutine.
type Fault func(op, name string) error

const (
	sysDevices = "sys/bus/pci/devices"
	sysDrivers = "sys/bus/pci/drivers"
	sysGroups  = "sys/kernel/iommu_groups"
)

// NewKernel unpacks a tree and gives every driver that is named in it, by a device's link or a directory below
// sys/bus/pci/drivers, its control files.
func NewKernel(tb testing.TB, tree Tree) *Kernel {
	tb.Helper()
	k := &Kernel{
		IDs: map[string][]string{}, Modules: map[string]string{}, Fail: map[string]error{}, Probe: map[string]error{},
		Busy: map[string]bool{}, Owners: map[string]host.Owner{},
		tb: tb, dir: tree.Dir(tb), home: map[string]Tree{}, classes: map[string]Tree{},
	}
	k.startProc()
	k.must(os.MkdirAll(k.at(sysDevices), 0o755))
	k.must(os.MkdirAll(k.at(sysDrivers), 0o755))
	k.put("sys/bus/pci/drivers_probe", "")
	for _, driver := range k.names(sysDrivers) {
		k.register(driver)
	}
	for _, address := range k.names(sysDevices) {
		dev := k.device(address)
		if driver := k.driver(dev); driver != "" {
			k.register(driver)
			k.bound(dev, driver)
		}
		if k.exists(dev + "/sriov_totalvfs") {
			if !k.exists(dev + "/sriov_numvfs") {
				k.put(dev+"/sriov_numvfs", strconv.Itoa(len(k.vfs(dev)))+"\n")
			}
			if !k.exists(dev + "/sriov_drivers_autoprobe") {
				k.put(dev+"/sriov_drivers_autoprobe", "1\n")
			}
		}
		if !k.exists(dev + "/driver_override") {
			k.put(dev+"/driver_override", "(null)\n")
		}
		k.putConfig(dev)
	}

	k.startNet()
	k.startVFIO()
	h, err := host.Fake(k.dir, k)
	k.must(err)
	tb.Cleanup(func() { k.must(h.Close()) })
	k.host = h
	return k
}

// Host is the host that this kernel runs. It is Live.
func (k *Kernel) Host() *host.Host { return k.host }

// Dir is the folder that the kernel's files are in, for a test that changes them behind its back.
func (k *Kernel) Dir() string { return k.dir }

// Register loads a driver that matches these "vvvv:dddd": as in the kernel it is probed at once for every device that
// has none.
func (k *Kernel) Register(driver string, ids ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.register(driver)
	k.IDs[driver] = append(k.IDs[driver], ids...)
	for _, address := range k.names(sysDevices) {
		if dev := k.device(address); k.driver(dev) == "" && k.matches(dev, driver) {
			// driver_attach.
			_ = k.probe(dev, driver)
		}
	}
}

// Write is a write(2) to a file, its name relative to the root.
func (k *Kernel) Write(name, value string) error {
	if k.Before != nil {
		k.Before(name, value)
	}
	k.awaitClosed(path.Clean(name), value)
	err := k.locked(path.Clean(name), value)
	k.tell()
	if k.After != nil {
		k.After(name, value)
	}
	return err
}

func (k *Kernel) locked(name, value string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.Log = append(k.Log, name+"="+value)
	if err := k.Fail[name]; err != nil {
		return err
	}
	real, err := k.resolve(name)
	if err != nil {
		return err
	}

	if st, err := os.Stat(k.at(real)); err != nil || st.IsDir() {
		return syscall.EISDIR
	}
	if value == "" {
		// A write of nothing reaches no driver (fs/sysfs/file.c, sysfs_kf_write)
		return k.writable(real)
	}
	if len(value) > 4096 {
		value = value[:4096]
	}
	if end := strings.IndexByte(value, 0); end >= 0 {
		value = value[:end]
	}
	return k.store(real, value)
}

func (k *Kernel) writable(file string) error {
	dir, attribute := path.Split(file)
	switch {
	case file == "sys/bus/pci/drivers_probe",
		path.Dir(path.Clean(dir)) == sysDrivers && (attribute == "bind" || attribute == "unbind"),
		attribute == "driver_override", attribute == "sriov_numvfs", attribute == "sriov_drivers_autoprobe",
		attribute == "sriov_vf_msix_count", attribute == "reset", attribute == "uevent",
		attribute == "cgroup.procs":
		return nil
	}
	return syscall.EACCES
}

func (k *Kernel) store(file, value string) error {
	if err := k.writable(file); err != nil {
		return err
	}

	dir, attribute := path.Dir(file), path.Base(file)
	// sysfs_streq.
	name := strings.TrimSuffix(value, "\n")
	switch attribute {
	case "drivers_probe":
		dev, err := k.find(name)
		if err != nil {
			return err
		}
		k.probeAll(dev)
		return nil
	case "bind":
		driver := path.Base(dir)
		dev, err := k.find(name)
		if err != nil || !k.matches(dev, driver) {
			return syscall.ENODEV
		}
		return k.probe(dev, driver)
	case "unbind":
		dev, err := k.find(name)
		if err != nil || k.driver(dev) != path.Base(dir) {
			return syscall.ENODEV
		}
		k.unbind(dev)
		return nil
	case "driver_override":
		if len(value) >= 4095 {
			return syscall.EINVAL
		}
		if value, _, _ = strings.Cut(value, "\n"); value == "" {
			value = "(null)"
		}
		k.put(file, value+"\n")
		return nil
	case "sriov_drivers_autoprobe":
		on, err := parseBool(name)
		if err != nil {
			return err
		}
		k.put(file, on+"\n")
		return nil
	case "uevent":
		return nil
	case "cgroup.procs":
		// cgroup_procs_write_start of kernel/cgroup/cgroup.c.
		if n, err := strconv.Atoi(name); err != nil || n < 0 {
			return syscall.EINVAL
		}
		return nil
	case "sriov_vf_msix_count":
		return k.vectors(dir, name)
	case "reset":
		// reset_store of pci-sysfs.c.
		if name != "1" {
			return syscall.EINVAL
		}
		if k.exists(dir+"/reset_method") && k.text(dir, "reset_method") == "" {
			return syscall.ENOTTY
		}
		return nil
	default:
		return k.numvfs(dir, name)
	}
}

// putConfig gives a device its config space, unless it has one. A VF has no ids of its own.
func (k *Kernel) putConfig(dev string) {
	switch {
	case k.exists(dev + "/config"):
	case k.exists(dev + "/physfn"):
		k.put(dev+"/config", configOf("ffff", "ffff", k.text(dev, "class")))
	default:
		k.put(dev+"/config", configOf(k.text(dev, "vendor"), k.text(dev, "device"), k.text(dev, "class")))
	}
}

// parseBool is kstrtobool, which goes by the first character, or two after "o".
func parseBool(s string) (string, error) {
	s = strings.ToLower(s)
	switch {
	case s == "":
	case strings.ContainsRune("yt1", rune(s[0])), strings.HasPrefix(s, "on"):
		return "1", nil
	case strings.ContainsRune("nf0", rune(s[0])), strings.HasPrefix(s, "of"):
		return "0", nil
	}
	return "", syscall.EINVAL
}

// matches is pci_match_device.
func (k *Kernel) matches(dev, driver string) bool {
	if o := k.override(dev); o != "" {
		return o == driver
	}
	id := strings.TrimPrefix(k.text(dev, "vendor"), "0x") + ":" + strings.TrimPrefix(k.text(dev, "device"), "0x")
	return (driver == "vfio-pci" || !strings.Contains(driver, "vfio")) && slices.Contains(k.IDs[driver], id)
}

func (k *Kernel) override(dev string) string {
	if o := k.text(dev, "driver_override"); o != "(null)" {
		return o
	}
	return ""
}

// probeAll is device_attach: every driver that matches, until one takes the device. Its callers learn nothing of it.
func (k *Kernel) probeAll(dev string) {
	for _, driver := range k.names(sysDrivers) {
		if k.driver(dev) == "" && k.matches(dev, driver) {
			_ = k.probe(dev, driver)
		}
	}
}

// probe is __driver_probe_device for a driver that matches.
func (k *Kernel) probe(dev, driver string) error {
	if k.driver(dev) != "" {
		return syscall.EBUSY
	}
	if pf, err := k.resolve(dev + "/physfn"); err == nil && k.text(pf, "sriov_drivers_autoprobe") == "0" &&
		k.override(dev) == "" {
		// pci_device_can_probe.
		return syscall.ENODEV
	}
	if err := errors.Join(k.Probe[driver], k.Probe[path.Base(dev)]); err != nil {
		return err
	}
	if group := k.LateGroups[path.Base(dev)]; group != "" && !k.exists(dev+"/iommu_group") {
		id := strings.TrimPrefix(group, "noiommu-")
		k.link(dev+"/iommu_group", path.Join(sysGroups, id))
		k.link(path.Join(sysGroups, id, "devices", path.Base(dev)), dev)
		k.put(path.Join(sysGroups, id, "type"), "DMA\n")
	}
	if class := strings.TrimPrefix(k.text(dev, "class"), "0x"); strings.Contains(driver, "vfio") {
		if strings.HasPrefix(class, "0604") || strings.HasPrefix(class, "0607") || !k.exists(dev+"/iommu_group") {
			return syscall.EINVAL
		}
		if len(k.vfs(dev)) > 0 {
			return syscall.EBUSY
		}
	}

	k.link(dev+"/driver", path.Join(sysDrivers, driver))
	k.bound(dev, driver)
	key := path.Base(dev) + " " + driver
	for _, t := range []Tree{k.home[key], k.classes[key]} {
		for name := range t {
			k.must(t.unpack(k.at(name), name))
		}
	}

	if strings.Contains(driver, "vfio") {
		k.makeNodes(dev)
	}
	return nil
}

// unbind takes away what the driver made of the device: a PF's VFs, network interfaces, the VFIO device.
func (k *Kernel) unbind(dev string) {
	driver := k.driver(dev)
	if len(k.vfs(dev)) > 0 {
		// As igb, mlx5_core and most do.
		k.removeVFs(dev)
	}
	key := path.Base(dev) + " " + driver
	k.classes[key] = k.takeClasses(dev)
	k.home[key] = Tree{}
	for _, class := range []string{"net", "block", "nvme", "ata1", "drm", "sound", "ptp", "hwmon", "i2c"} {
		maps.Copy(k.home[key], k.takeAway(path.Join(dev, class)))
	}
	k.removeNodes(dev, driver)
	k.must(os.Remove(k.at(dev + "/driver")))
	k.must(os.Remove(k.at(path.Join(sysDrivers, driver, path.Base(dev)))))
}

// takeClasses removes the links of /sys/class into the device and returns them.
func (k *Kernel) takeClasses(dev string) Tree {
	out := Tree{}
	for _, class := range k.names("sys/class") {
		for _, n := range k.names(path.Join("sys/class", class)) {
			file := path.Join("sys/class", class, n)
			target, err := os.Readlink(k.at(file))
			if err != nil || !strings.HasPrefix(path.Join(path.Dir(file), target), dev+"/") || class == "iommu" {
				continue
			}
			out[file] = arrow + target
			k.must(os.Remove(k.at(file)))
		}
	}
	return out
}

// takeAway removes a directory and returns what was in it.
func (k *Kernel) takeAway(dir string) Tree {
	out := Tree{}
	err := filepath.WalkDir(k.at(dir), func(file string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(k.dir, file)
		if err != nil {
			return err
		}
		if e.Type() == fs.ModeSymlink {
			target, err := os.Readlink(file)
			out[name] = arrow + target
			return err
		}
		b, err := os.ReadFile(file)
		out[name] = string(b)
		return err
	})

	if !errors.Is(err, fs.ErrNotExist) {
		k.must(err)
	}
	k.must(os.RemoveAll(k.at(dir)))
	return out
}

func (k *Kernel) register(driver string) {
	for _, file := range []string{"bind", "unbind"} {
		k.put(path.Join(sysDrivers, driver, file), "")
	}
}

// bound is the driver's own link to its device.
func (k *Kernel) bound(dev, driver string) {
	if link := path.Join(sysDrivers, driver, path.Base(dev)); !k.exists(link) {
		k.link(link, dev)
	}
}

// find is bus_find_device_by_name.
func (k *Kernel) find(address string) (string, error) {
	if address == "" || strings.Contains(address, "/") || !k.exists(path.Join(sysDevices, address)) {
		return "", syscall.ENODEV
	}
	return k.device(address), nil
}

// device is a device's own directory.
func (k *Kernel) device(address string) string {
	dev, err := k.resolve(path.Join(sysDevices, address))
	k.must(err)
	return dev
}

func (k *Kernel) driver(dev string) string {
	target, err := os.Readlink(k.at(dev + "/driver"))
	if err != nil {
		return ""
	}
	return path.Base(target)
}

// resolve follows all links in a name and gives the name of what is there.
func (k *Kernel) resolve(name string) (string, error) {
	root, err := filepath.EvalSymlinks(k.dir)
	k.must(err)
	real, err := filepath.EvalSymlinks(k.at(name))
	if errors.Is(err, fs.ErrNotExist) {
		return "", syscall.ENOENT
	}
	if err != nil {
		return "", err
	}
	return filepath.Rel(root, real)
}

func (k *Kernel) at(name string) string { return filepath.Join(k.dir, name) }

func (k *Kernel) exists(name string) bool {
	_, err := os.Lstat(k.at(name))
	return err == nil
}

func (k *Kernel) names(dir string) []string {
	entries, err := os.ReadDir(k.at(dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		k.must(err)
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names
}

func (k *Kernel) text(dev, attribute string) string {
	b, err := os.ReadFile(k.at(path.Join(dev, attribute)))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

func (k *Kernel) number(dev, attribute string) int {
	n, err := strconv.Atoi(k.text(dev, attribute))
	k.must(err)
	return n
}

func (k *Kernel) put(file, content string) {
	k.must(os.MkdirAll(k.at(path.Dir(file)), 0o755))
	// A reader sees the old content or the new one, as in the kernel.
	tmp := k.at(".new")
	k.must(os.WriteFile(tmp, []byte(content), 0o644))
	k.must(os.Rename(tmp, k.at(file)))
}

// link makes a relative link; both names are relative to the root.
func (k *Kernel) link(name, to string) {
	k.must(os.MkdirAll(k.at(path.Dir(name)), 0o755))
	target, err := filepath.Rel(k.at(path.Dir(name)), k.at(to))
	k.must(err)
	k.must(os.Symlink(target, k.at(name)))
}

// must ends the process's test run by a panic and not by tb.Fatal, as writes come from any goroutine.
func (k *Kernel) must(err error) {
	if err != nil {
		k.fatal("%v", err)
	}
}

func (k *Kernel) fatal(format string, a ...any) {
	panic(fmt.Sprintf("%s: the fake kernel cannot go on: %s", k.tb.Name(), fmt.Sprintf(format, a...)))
}
