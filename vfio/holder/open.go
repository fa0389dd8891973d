package holder

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio"
)

// Node is a device file, whatever its name is in some chroot or mount namespace.
type Node struct {
	Block  bool   `json:"block,omitempty"`
	Number uint64 `json:"number"` // the major number in the upper 32 bits
}

// Processes finds processes that have a device open: the node of its group, its own node, or the nodes of what its
// driver made of it (verbs, disks, render nodes). Unbinding a device that a guest has open blocks for as long as it
// has. Of a captured host it returns those that did when that was captured, as [Find] does.
func Processes(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	if !h.Live() {
		return findCaptured(h, devices, Process)
	}

	nodes := map[Node]*iommu.Device{}
	for _, d := range devices {
		found, err := Nodes(h, d)
		if err != nil {
			return nil, err
		}
		for _, n := range found {
			nodes[n] = d
		}
	}
	out, err := openIn(h, devices, nodes)
	if err == nil {
		err = allProcesses(h)
	}
	return out, err
}

// allProcesses is an ErrBlind where /proc does not show all processes of the host, as it is that of another pid
// namespace.
func allProcesses(h *iommu.Host) error {
	// PROC_PID_INIT_INO of include/uapi/linux/nsfs.h, the kernel's first.
	const first = "pid:[4026531836]"
	now, err := h.Link("proc/self/ns/pid")
	switch {
	case host.Absent(err), errors.Is(err, errNoLink):
		// A kernel without such namespaces.
		return nil
	case err == nil && now != first:
		err = fmt.Errorf("%w: /proc/self/ns/pid is %s", ErrBlind, now)
	}
	return err
}

// OpenIn finds the processes that have one of the nodes open that led to a device when [Nodes] listed them: while an
// unbind waits for one of them, the device itself leads to none any more.
func OpenIn(h *iommu.Host, a iommu.Address, nodes []Node) ([]Holder, error) {
	d := &iommu.Device{Name: a.String(), Address: a, PCI: true}
	of := map[Node]*iommu.Device{}
	for _, n := range nodes {
		of[n] = d
	}
	return openIn(h, []*iommu.Device{d}, of)
}

// openIn finds the processes that have one of the nodes open.
func openIn(h *iommu.Host, devices []*iommu.Device, nodes map[Node]*iommu.Device) ([]Holder, error) {
	if len(nodes) == 0 {
		return nil, nil
	}
	pids, err := processes(h)
	if err != nil {
		return nil, err
	}

	var out []Holder
	var blind error
	end := time.Now().Add(lookTime)
	for _, pid := range pids {
		held, err := heldBy(h, pid, devices, nodes, end)
		if errors.Is(err, ErrTooMany) {
			return out, err
		}
		if errors.Is(err, ErrBlind) {
			blind = err
		} else if err != nil {
			return nil, err
		}
		if len(held) == 0 {
			continue
		}

		name := processName(h, pid)
		if strings.HasPrefix(name, "(udev-worker") || strings.Contains(name, "udevd") {
			// It looks at every new disk, and is gone in a moment.
			continue
		}
		number, _ := strconv.Atoi(pid)
		guest := guestName(h, pid, name)
		for _, d := range held {
			what := "is open in " + describe(pid, name, guest)
			out = append(out, Holder{
				Device: d.Name, Kind: Process, PID: number, Guest: guest, What: what, Brief: name + " " + pid,
			})
		}
	}
	return out, blind
}

// lookTime is how long a look at all open files may take, which is some seconds on a host with a million of them.
var lookTime = 20 * time.Second

// heldBy are the devices that one process has open. A process that ended has none. After a time it is an ErrTooMany.
func heldBy(h *iommu.Host, pid string, devices []*iommu.Device, nodes map[Node]*iommu.Device,
	end time.Time) ([]*iommu.Device, error) {
	dir := path.Join("proc", pid, "fd")
	fds, err := h.Names(dir)
	if err != nil {
		return nil, unseenOf(h, pid, dir, err)
	}

	var held, nameless []*iommu.Device
	var blind error
	viaNode := false
	for i, fd := range fds {
		if i%1024 == 0 && time.Now().After(end) {
			return held, fmt.Errorf("%w: the check ended at /%s after %s", ErrTooMany, dir, lookTime)
		}
		target, err := h.Link(path.Join(dir, fd))
		if err != nil {
			if err = unseenOf(h, pid, dir, err); errors.Is(err, ErrBlind) {
				blind = err
			} else if err != nil {
				return nil, err
			}
			continue
		}

		var found []*iommu.Device
		switch {
		case strings.HasPrefix(target, "anon_inode:[vfio-device]"):
			d, named := openDevice(h, pid, fd, devices)
			if !named {
				nameless = onVFIO(devices)
			} else if d != nil {
				found = append(found, d)
			}
		case strings.HasPrefix(target, "/"), strings.HasPrefix(target, "(unreachable)"):
			viaNode = viaNode || strings.HasPrefix(target, "/dev/vfio/") && target != "/dev/vfio/vfio"
			block, number, err := h.DeviceNumber(path.Join(dir, fd))
			if errors.Is(err, host.ErrNoDevice) {
				continue
			}
			if err != nil {
				if err = unseenOf(h, pid, dir, err); errors.Is(err, ErrBlind) {
					blind = err
				} else if err != nil {
					return nil, err
				}
				continue
			}
			if d := nodes[Node{block, number}]; d != nil {
				found = append(found, d)
			}
		}
		for _, d := range found {
			if !slices.Contains(held, d) {
				held = append(held, d)
			}
		}
	}

	// Who was passed the descriptor of a device and has no node of VFIO may have any device, where the kernel does not
	// say which.
	if len(nameless) > 0 && !viaNode {
		return nameless, blind
	}
	return held, blind
}

func onVFIO(devices []*iommu.Device) []*iommu.Device {
	return slices.DeleteFunc(slices.Clone(devices), func(d *iommu.Device) bool { return !d.VFIO })
}

// unseen is the ErrBlind of what may not be looked at, nil for a process or descriptor that is gone, and else the error
// itself.
func unseen(dir string, err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: /%s: %w", ErrBlind, dir, unix.EACCES)
	case host.Absent(err) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, errNoLink):
		return nil
	}
	return err
}

// unseenOf is unseen for what a process has. Of one that has just gone the kernel says that it may not be looked at
// (fs/proc/namespaces.c, proc_ns_readlink).
func unseenOf(h *iommu.Host, pid, dir string, err error) error {
	if err = unseen(dir, err); !errors.Is(err, ErrBlind) {
		return err
	}
	if _, gone := h.String(path.Join("proc", pid, "stat")); host.Absent(gone) || errors.Is(gone, unix.ESRCH) {
		return nil
	}
	return err
}

// Nodes are all nodes that lead to a device: of VFIO, or of what the host's driver made of it and of what is below it.
func Nodes(h *iommu.Host, d *iommu.Device) ([]Node, error) {
	if !d.PCI || d.Driver == "" {
		return nil, nil
	}
	var nodes []Node
	add := func(block bool, text string) {
		if number, ok := parseNumber(text); ok && !slices.Contains(nodes, Node{block, number}) {
			nodes = append(nodes, Node{block, number})
		}
	}
	read := func(block bool, file string) error {
		text, err := h.Steady(file)
		if host.Absent(err) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		add(block, text)
		return err
	}

	own, err := vfio.Numbers(h, d)
	for _, file := range own {
		err = errors.Join(err, read(false, file))
	}
	if err != nil || iommu.IsVFIODriver(d.Driver) {
		// Which makes nothing else.
		return nodes, err
	}

	files, groups, err := iommu.DeviceFiles(h, d.Address)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		add(f.Block, f.Number)
	}
	for _, g := range groups {
		err = errors.Join(err, read(false, path.Join("sys/class/vfio", strconv.Itoa(g), "dev")))
	}
	disks, failed := Disks(h, d)
	for _, n := range disks {
		err = errors.Join(err, read(true, path.Join(blockClass, n, "dev")))
		// The same namespace of NVMe is there as a character device.
		if number, ok := strings.CutPrefix(n, "nvme"); ok {
			err = errors.Join(err, read(false, path.Join("sys/class/nvme-generic", "ng"+number, "dev")))
		}
	}
	minor, unknown := nvidiaMinor(h, d)
	if minor >= 0 {
		nodes = append(nodes, Node{Number: nvidiaMajor<<32 | uint64(minor)})
	}
	if err = errors.Join(err, failed, unknown); err != nil {
		return nil, err
	}
	return nodes, nil
}

// nvidiaMajor is the major number of /dev/nvidiaN, which sysfs does not know (kernel-open/common/inc/nv-linux.h,
// NV_MAJOR_DEVICE_NUMBER).
const nvidiaMajor = 195

// nvidiaMinor is the number of the node that NVIDIA's own driver made for a device, -1 if there is none.
func nvidiaMinor(h *iommu.Host, d *iommu.Device) (int, error) {
	text, err := h.String(path.Join("proc/driver/nvidia/gpus", d.Name, "information"))
	if host.Absent(err) {
		return -1, nil
	}
	for line := range strings.Lines(text) {
		if word, ok := strings.CutPrefix(line, "Device Minor:"); ok {
			return strconv.Atoi(strings.TrimSpace(word))
		}
	}
	return -1, err
}

// parseNumber reads the major:minor of a dev attribute.
func parseNumber(s string) (uint64, bool) {
	major, minor, ok := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	return a<<32 | b, ok && err1 == nil && err2 == nil
}

// openDevice is the device behind a descriptor of the container interface, nil if it is none of these; named is false
// where the kernel does not tell (before Linux 6.18).
func openDevice(h *iommu.Host, pid, fd string, devices []*iommu.Device) (d *iommu.Device, named bool) {
	info, err := h.Read(path.Join("proc", pid, "fdinfo", fd))
	if err != nil {
		return nil, false
	}

	for line := range strings.Lines(string(info)) {
		syspath, ok := strings.CutPrefix(strings.TrimSpace(line), "vfio-device-syspath:")
		if !ok {
			continue
		}
		// A mediated device is below the one that it is made of.
		for _, name := range slices.Backward(strings.Split(strings.TrimSpace(syspath), "/")) {
			for _, d := range devices {
				if d.Name == name {
					return d, true
				}
			}
		}
		return nil, true
	}
	return nil, false
}
