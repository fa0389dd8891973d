package iommu

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/netlink"
)

// readNetdevs gives each device its network interfaces. /sys/class/net names them all at once, also those of a device
// in between, as virtio's, which a look into the PCI device's own net directory would miss.
func readNetdevs(h *Host, devices []Device) error {
	names, err := h.Names(netClass)
	if host.Absent(err) || (err == nil && len(names) == 0) {
		return nil
	}
	if err != nil {
		return err
	}
	dir, err := h.Open(netClass)
	if err != nil {
		return err
	}
	defer dir.Close()

	var unsure []*Device
	for _, name := range names {
		// What is no link is gone, or a file such as bonding_masters.
		target, _, err := linkOf(dir, name)
		if err != nil {
			return err
		}
		a, ok := lastAddress(target)
		if !ok {
			continue
		}
		d := findDevice(devices, a)
		switch {
		case d == nil:
		case !isOwn(target, a):
			d.Ports = append(d.Ports, name)
		default:
			// A PF's only one may be a representor, where its own is in another network namespace.
			d.Netdevs = append(d.Netdevs, name)
			if n := len(d.Netdevs); n == 1 && d.SRIOV != nil || n == 2 && d.SRIOV == nil {
				unsure = append(unsure, d)
			}
		}
	}
	for _, d := range unsure {
		if err := sortPorts(dir, d); err != nil {
			return err
		}
	}
	return nil
}

// isOwn reports whether the device of an interface is the PCI function itself, or what virtio has in its place. Others
// are those of a subfunction (an auxiliary device) and of a USB device.
func isOwn(target string, a Address) bool {
	_, below, _ := strings.Cut(target, "/"+a.String()+"/")
	between, _, _ := strings.Cut(below, "net/")
	between = strings.TrimSuffix(between, "/")
	return between == "" || strings.HasPrefix(between, "virtio") && !strings.Contains(between, "/")
}

// sortPorts parts the interfaces of a device: those that stand for another function, as the representors of VFs, are
// its ports. Several of its own are ordered by the card's ports.
func sortPorts(dir *host.Dir, d *Device) error {
	var own []string
	for _, n := range d.Netdevs {
		port, err := readPortName(dir, n)
		if err != nil {
			return err
		}
		if port.Function {
			d.Ports = append(d.Ports, n)
		} else {
			own = append(own, n)
		}
	}
	d.Netdevs = own
	if len(own) < 2 {
		return nil
	}
	numbers := map[string]int{}
	for _, n := range own {
		number, err := dir.Int(path.Join(n, "dev_port"))
		if err != nil && !host.Absent(err) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.EINVAL) {
			return err
		}
		numbers[n] = number
	}
	slices.SortStableFunc(d.Netdevs, func(a, b string) int { return numbers[a] - numbers[b] })
	return nil
}

// PortName is what an interface says whom it stands for (net/devlink/port.c).
type PortName struct {
	Wire     bool // p0, p0s1, l1p0: what goes out of the card
	Function bool // pf0vf1, pf0sf2, c1pf0: another function, of this host or of another
	PF       int  // of a Function: the number of the PF or, with some drivers, of its port
	VF       *int // of a VF of this host, else nil
}

// ReadPortName reads whom an interface stands for; the zero value of one that does not say.
func ReadPortName(h *Host, name string) (PortName, error) {
	dir, err := h.Open(netClass)
	if err != nil {
		return PortName{}, err
	}
	defer dir.Close()
	return readPortName(dir, name)
}

func readPortName(dir *host.Dir, name string) (PortName, error) {
	text, err := dir.String(path.Join(name, "phys_port_name"))
	if host.Absent(err) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTDIR) {
		return PortName{}, nil
	}
	return parsePortName(text), err
}

// parsePortName reads the words of net/devlink/port.c; a controller of another host is put before them.
func parsePortName(s string) PortName {
	var p PortName
	var vf int
	var rest string
	switch n, _ := fmt.Sscanf(s, "pf%dvf%d%s", &p.PF, &vf, &rest); n {
	case 2:
		p.Function, p.VF = true, &vf
		return p
	case 1:
		p.Function = true
		return p
	}
	if strings.HasPrefix(s, "c") && strings.Contains(s, "pf") {
		return PortName{Function: true}
	}

	if strings.HasPrefix(s, "l") {
		_, s, _ = strings.Cut(s[1:], "p")
		s = "p" + s
	}
	n, _ := fmt.Sscanf(s, "p%d%s", &p.PF, &rest)
	return PortName{Wire: n == 1 || n == 2 && strings.HasPrefix(rest, "s")}
}

// ReadNetdevs reads the network interfaces of a PCI device again.
func ReadNetdevs(h *Host, d *Device) error {
	one := []Device{{Address: d.Address, PCI: true, SRIOV: d.SRIOV}}
	if err := readNetdevs(h, one); err != nil {
		return err
	}
	d.Netdevs, d.Ports = one[0].Netdevs, one[0].Ports
	return nil
}

// renames is how often an interface may change its name while it is looked at: udev names new ones.
const renames = 10

// ByName calls look with a device, and again with one that has its interfaces' new names if one was renamed meanwhile.
// Then an error of look says that something is not there, or what it saw was another device's, which has the name now:
// at boot one eth0 follows the other.
func ByName(h *Host, d *Device, look func(now *Device) error) error {
	err := look(d)
	if !h.Live() {
		return err
	}

	for now, try := *d, 0; ; try++ {
		renamed := host.Absent(err)
		if err == nil {
			if renamed, err = wereRenamed(h, &now); err != nil {
				return err
			}
		}
		switch {
		case !renamed:
			return err
		case try == renames && err == nil:
			return fmt.Errorf("%s: its network interfaces keep changing their names", d.Name)
		case try == renames:
			return err
		}
		if err = ReadNetdevs(h, &now); err == nil {
			err = look(&now)
		}
	}
}

// wereRenamed reports whether one of a device's interfaces has another name by now.
func wereRenamed(h *Host, d *Device) (bool, error) {
	for _, n := range d.Interfaces() {
		target, err := h.Link(path.Join(netClass, n))
		if host.Absent(err) || errors.Is(err, unix.EINVAL) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		a, ok := lastAddress(target)
		its := ok && a == d.Address
		if !d.PCI {
			its = slices.Contains(strings.Split(target, "/"), d.Name)
		}
		if !its {
			return true, nil
		}
	}
	return false, nil
}

// alternatives is where a snapshot has the alternative names of interfaces, which no file of the kernel tells: a line
// for each interface, with its name first.
const alternatives = "viaduct/alternative-names"

// firstName is the name of the interface that has this as an alternative one, "" if there is none.
func firstName(h *Host, name string) (string, error) {
	if h.Live() {
		return netlink.FirstName(h.Host, name)
	}
	text, err := readTold(h, alternatives, "alternative names")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(text) {
		if words := strings.Fields(line); slices.Contains(words, name) {
			return words[0], nil
		}
	}
	return "", nil
}

// alternativeNames is what a snapshot has of them; nil if there are none.
func alternativeNames(h *Host) ([]byte, error) {
	if !h.Live() {
		text, err := h.Read(alternatives)
		return text, unlessAbsent(err)
	}
	all, err := netlink.Alternatives(h.Host)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, name := range slices.Sorted(maps.Keys(all)) {
		out = fmt.Appendln(out, name, strings.Join(all[name], " "))
	}
	return out, nil
}

// Interfaces are all network interfaces that stand on a device: its own and its ports.
func (d *Device) Interfaces() []string { return slices.Concat(d.Netdevs, d.Ports) }
