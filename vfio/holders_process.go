package vfio

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// node is a device file, whatever its name is in some chroot or mount namespace.
type node struct {
	Block  bool   `json:"block,omitempty"`
	Number uint64 `json:"number"` // the major number in the upper 32 bits
}

// ErrBlind is matched by errors that say that what other processes have open could not be seen; what could is returned beside it.
var ErrBlind = errors.New("who has the device open cannot be seen (that takes root with CAP_SYS_PTRACE, in the host's pid namespace)")

// ProcessHolders finds processes that have a device open: the node of its group, its own node, or the nodes of what its
// driver made of it (verbs, disks, render nodes). Unbinding a device that a guest has open blocks for as long as it has.
func ProcessHolders(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	holders, _, err := processHolders(h, devices)
	return holders, err
}

// processHolders also tells what nodes lead to each device.
func processHolders(h *iommu.Host, devices []*iommu.Device) ([]Holder, map[iommu.Address][]node, error) {
	if !h.Live() {
		return nil, nil, nil
	}
	nodes, of := map[node]*iommu.Device{}, map[iommu.Address][]node{}
	for _, d := range devices {
		found, err := nodesOf(h, d)
		if err != nil {
			return nil, nil, err
		}
		if d.PCI {
			of[d.Address] = found
		}
		for _, n := range found {
			nodes[n] = d
		}
	}
	holders, err := openIn(h, devices, nodes)
	return holders, of, err
}

// openIn finds the processes that have one of the nodes open.
func openIn(h *iommu.Host, devices []*iommu.Device, nodes map[node]*iommu.Device) ([]Holder, error) {
	if len(nodes) == 0 {
		return nil, nil
	}
	pids, err := processes(h)
	if err != nil {
		return nil, err
	}
	var out []Holder
	var blind error
	for _, pid := range pids {
		dir := path.Join("proc", pid, "fd")
		fds, err := h.Names(dir)
		unseen := func(err error) {
			if errors.Is(err, fs.ErrPermission) {
				blind = fmt.Errorf("%w: /%s: %w", ErrBlind, dir, unix.EACCES)
			}
		}
		if err != nil {
			unseen(err) // else it ended
			continue
		}
		var held []*iommu.Device
		for _, fd := range fds {
			target, err := h.Link(path.Join(dir, fd))
			if err != nil {
				unseen(err)
				continue
			}
			var d *iommu.Device
			if strings.HasPrefix(target, "anon_inode:[vfio-device]") {
				d = openDevice(h, pid, fd, devices)
			} else if target[0] == '/' {
				if block, number, ok := h.DeviceNumber(path.Join(dir, fd)); ok {
					d = nodes[node{block, number}]
				}
			}
			if d != nil && !slices.Contains(held, d) {
				held = append(held, d)
			}
		}
		if len(held) == 0 {
			continue
		}
		name := processName(h, pid)
		if strings.HasPrefix(name, "(udev-worker") || strings.Contains(name, "udevd") {
			continue // looks at every new disk, and is gone in a moment
		}
		number, _ := strconv.Atoi(pid)
		for _, d := range held {
			guest := guestName(h, pid, name)
			out = append(out, Holder{Device: d.Name, Kind: Process, PID: number, Guest: guest, What: "is open in " + describe(pid, name, guest)})
		}
	}
	return out, blind
}

// nodesOf are all nodes that lead to a device.
func nodesOf(h *iommu.Host, d *iommu.Device) ([]node, error) {
	var nodes []node
	add := func(block bool, file string) {
		if text, err := h.Steady(file); err == nil {
			if number, ok := parseNumber(text); ok {
				nodes = append(nodes, node{block, number})
			}
		}
	}
	if !d.PCI || d.Driver == "" {
		return nil, nil
	}
	if iommu.IsVFIODriver(d.Driver) {
		own, err := vfioNodes(h, d)
		for _, n := range own {
			add(false, n.sign)
		}
		return nodes, err
	}
	classes, err := iommu.ClassDevices(h, d.Address)
	if err != nil {
		return nil, err
	}
	for class, names := range classes {
		for _, n := range names {
			if class != "net" && class != "block" {
				add(false, path.Join("sys/class", class, n, "dev"))
			}
		}
	}
	disks, err := blockDevices(h, d)
	if err != nil {
		return nil, err
	}
	for _, n := range disks {
		add(true, path.Join(blockClass, n, "dev"))
		if number, ok := strings.CutPrefix(n, "nvme"); ok { // the same namespace as a character device
			add(false, path.Join("sys/class/nvme-generic", "ng"+number, "dev"))
		}
	}
	return nodes, nil
}

// parseNumber reads the major:minor of a dev attribute.
func parseNumber(s string) (uint64, bool) {
	major, minor, ok := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	return a<<32 | b, ok && err1 == nil && err2 == nil
}

// openDevice is the device behind the device file of the container interface, where the kernel tells (Linux 6.18).
func openDevice(h *iommu.Host, pid, fd string, devices []*iommu.Device) *iommu.Device {
	info, err := h.Read(path.Join("proc", pid, "fdinfo", fd))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(info)) {
		if syspath, ok := strings.CutPrefix(strings.TrimSpace(line), "vfio-device-syspath:"); ok {
			i := slices.IndexFunc(devices, func(d *iommu.Device) bool { return d.Name == path.Base(strings.TrimSpace(syspath)) })
			if i >= 0 {
				return devices[i]
			}
		}
	}
	return nil
}

func processes(h *iommu.Host) ([]string, error) {
	names, err := h.Names("proc")
	return slices.DeleteFunc(names, func(n string) bool { return n[0] < '0' || n[0] > '9' }), err
}

// namespaces looks into every namespace of a type (mnt, net) that any process is in, but for this one's own, until one process
// of each let it: look returns false if its process has ended.
func namespaces(h *iommu.Host, kind string, look func(pid string) bool) error {
	pids, err := processes(h)
	if err != nil {
		return err
	}
	own, err := h.Link(path.Join("proc/self/ns", kind))
	seen := map[string]bool{own: err == nil}
	for _, pid := range pids {
		if id, err := h.Link(path.Join("proc", pid, "ns", kind)); err == nil && !seen[id] {
			seen[id] = look(pid)
		}
	}
	return nil
}

func processName(h *iommu.Host, pid string) string {
	name, _ := h.String(path.Join("proc", pid, "comm"))
	return name
}

// describe is a process with what a user can find it by.
func describe(pid, name, guest string) string {
	s := fmt.Sprintf("process %s (%s)", pid, name)
	if guest != "" {
		s += fmt.Sprintf(", guest %q", guest)
	}
	return s
}

// guestName is what a QEMU calls its guest: -name NAME, or -name guest=NAME,...
func guestName(h *iommu.Host, pid, name string) string {
	if !strings.HasPrefix(name, "qemu") && name != "kvm" {
		return ""
	}
	line, err := h.Read(path.Join("proc", pid, "cmdline"))
	if err != nil {
		return ""
	}
	args := strings.Split(string(line), "\x00")
	for i, a := range args[:max(len(args)-1, 0)] {
		if a != "-name" {
			continue
		}
		for option := range strings.SplitSeq(args[i+1], ",") {
			if guest, ok := strings.CutPrefix(option, "guest="); ok {
				return guest
			}
		}
		guest, _, _ := strings.Cut(args[i+1], ",")
		return guest
	}
	return ""
}
