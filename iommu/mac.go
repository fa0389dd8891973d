package iommu

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/netlink"
)

// PermanentMACs returns, by interface, the addresses that a device's own interfaces were made with. An interface whose
// permanent address nobody knows is left out: what it shows may be borrowed, as a bond's is by its ports. An error says
// that nobody could be asked.
func PermanentMACs(h *Host, d *Device) (map[string]string, error) {
	var out map[string]string
	err := ByName(h, d, func(now *Device) (err error) {
		out, err = permanentMACs(h, now.Netdevs)
		return err
	})
	return out, err
}

func permanentMACs(h *Host, names []string) (map[string]string, error) {
	out := map[string]string{}
	if len(names) == 0 {
		return out, nil
	}
	if h.Live() {
		permanent, err := netlink.Permanent(h.Host, names)
		if err != nil {
			return nil, err
		}
		for n, mac := range permanent {
			out[n] = mac.String()
		}
	} else if err := capturedMACs(h, names, out); err != nil {
		return nil, err
	}

	for _, n := range names {
		if out[n] != "" {
			continue
		}
		mac, err := ownMAC(h, n)
		if err != nil {
			return nil, err
		}
		if mac != "" {
			out[n] = mac
		}
	}
	return out, nil
}

// permanents is where a snapshot has the permanent addresses of interfaces, which no file of the kernel tells: a line
// for each, with its name first.
const permanents = "viaduct/permanent-addresses"

// capturedMACs adds what a snapshot says of interfaces.
func capturedMACs(h *Host, names []string, out map[string]string) error {
	text, err := readTold(h, permanents, "permanent addresses")
	if err != nil {
		return err
	}
	for line := range strings.Lines(text) {
		if words := strings.Fields(line); len(words) == 2 && slices.Contains(names, words[0]) {
			out[words[0]] = words[1]
		}
	}
	return nil
}

// permanentAddresses is what a snapshot has of them; nil if there are none.
func permanentAddresses(h *Host, t *Topology) ([]byte, error) {
	if !h.Live() {
		text, err := h.Read(permanents)
		return text, unlessAbsent(err)
	}
	var names []string
	t.All(func(d *Device) bool {
		names = append(names, d.Netdevs...)
		return true
	})
	all, err := netlink.Permanent(h.Host, names)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, name := range slices.Sorted(maps.Keys(all)) {
		out = fmt.Appendln(out, name, all[name])
	}
	return out, nil
}

// ownMAC is the address that an interface shows, if that is the one it was made with, or else the one that its bond
// remembers; "" if it is not known.
func ownMAC(h *Host, name string) (string, error) {
	// NET_ADDR_PERM of include/uapi/linux/netdevice.h; others are random, stolen, or were set.
	const permanent = "0"
	kind, err := h.String(path.Join(netClass, name, "addr_assign_type"))
	switch {
	case err == nil && kind == permanent:
		return h.String(path.Join(netClass, name, "address"))
	case err != nil && !host.Absent(err) && !errors.Is(err, unix.EINVAL):
		return "", err
	}
	known := err == nil

	master, err := h.LinkBase(path.Join(netClass, name, "master"))
	if err == nil {
		return bondMAC(h, master, name)
	}
	if !host.Absent(err) || known {
		return "", unlessAbsent(err)
	}
	// Of an old snapshot, which does not say.
	return h.String(path.Join(netClass, name, "address"))
}

func unlessAbsent(err error) error {
	if host.Absent(err) {
		return nil
	}
	return err
}

// bondMAC is the permanent address of a bond's port (drivers/net/bonding/bond_procfs.c), "" if the master is no bond.
func bondMAC(h *Host, master, port string) (string, error) {
	text, err := h.Read(path.Join("proc/net/bonding", master))
	if err != nil {
		return "", unlessAbsent(err)
	}
	its := false
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch {
		case key == "Slave Interface":
			its = value == port
		case its && key == "Permanent HW addr":
			return value, nil
		}
	}
	return "", nil
}

// PermanentMAC returns the address that an interface was made with, or that it has where the kernel does not know that.
// An error says that the kernel could not be asked: then it is not known, and nothing may be derived from it.
func PermanentMAC(h *Host, name string) (net.HardwareAddr, error) {
	known, err := permanentMACs(h, []string{name})
	if err != nil {
		return nil, err
	}
	text := known[name]
	if text == "" {
		if text, err = h.String(path.Join(netClass, name, "address")); err != nil {
			return nil, err
		}
	}
	mac, err := net.ParseMAC(text)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	return mac, nil
}
