package iommu

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/netlink"
)

// Bridge is a bridge of the kernel's, such as guests' virtual NICs are ports of.
type Bridge struct {
	Name      string       `json:"name"`
	Address   string       `json:"address"`
	MTU       int          `json:"mtu"`
	Up        bool         `json:"up"`
	Filtering bool         `json:"vlan_filtering"` // it keeps VLANs apart
	PVID      int          `json:"default_pvid"`   // of a new port's frames without a tag; 0 for none
	Ports     []BridgePort `json:"ports"`
}

// BridgePort is an interface that is a port of a bridge.
type BridgePort struct {
	Name  string     `json:"name"`
	VLANs []PortVLAN `json:"vlans"` // nil: not known, or the bridge does not keep them apart
}

// PortVLAN is a VLAN that a bridge's port lets through.
type PortVLAN = netlink.PortVLAN

// VLANInterface is an interface that is a VLAN of another one.
type VLANInterface struct {
	Name string `json:"name"`
	ID   int    `json:"id"`
	Over string `json:"over"`
}

const (
	vlanConfig = "proc/net/vlan/config"

	// bridgeVLANs is where a snapshot has the VLANs of bridges' ports, which no file of the kernel tells: a line for
	// each, with the interface first, then the number, and what else is said of it.
	bridgeVLANs = "viaduct/bridge-vlans"
)

var bridgeFiles = []string{
	"address", "mtu", "operstate", "flags", "bridge/vlan_filtering", "bridge/default_pvid", "bridge/stp_state",
}

// Bridges are the host's bridges, by name, with their ports.
func Bridges(h *Host) ([]Bridge, error) {
	names, err := h.Names(netClass)
	if err != nil {
		return nil, unlessAbsent(err)
	}

	var out []Bridge
	var vlans map[string][]PortVLAN
	for _, n := range names {
		at := path.Join(netClass, n)
		if !h.Exists(path.Join(at, "bridge")) {
			continue
		}
		b := Bridge{Name: n}
		b.Address, _ = h.String(path.Join(at, "address"))
		b.MTU, _ = h.Int(path.Join(at, "mtu"))
		flags, err := h.Int(path.Join(at, "flags"))
		b.Up = err == nil && flags&unix.IFF_UP != 0
		filtering, err := h.Int(path.Join(at, "bridge/vlan_filtering"))
		b.Filtering = err == nil && filtering != 0
		b.PVID, _ = h.Int(path.Join(at, "bridge/default_pvid"))
		ports, err := h.Names(path.Join(at, "brif"))
		if err != nil && !host.Absent(err) {
			return nil, err
		}
		if b.Filtering && vlans == nil {
			if vlans, err = portVLANs(h); err != nil {
				return nil, err
			}
		}
		for _, p := range ports {
			b.Ports = append(b.Ports, BridgePort{Name: p, VLANs: vlans[p]})
		}
		out = append(out, b)
	}

	return out, nil
}

// VLANInterfaces are the host's interfaces that are VLANs of others (net/8021q/vlanproc.c).
func VLANInterfaces(h *Host) ([]VLANInterface, error) {
	text, err := h.Read(vlanConfig)
	if err != nil {
		return nil, unlessAbsent(err)
	}
	var out []VLANInterface
	for line := range strings.Lines(string(text)) {
		f := strings.Split(line, "|")
		if len(f) != 3 {
			continue
		}
		if id, err := strconv.Atoi(strings.TrimSpace(f[1])); err == nil {
			out = append(out, VLANInterface{Name: strings.TrimSpace(f[0]), ID: id, Over: strings.TrimSpace(f[2])})
		}
	}
	return out, nil
}

func portVLANs(h *Host) (map[string][]PortVLAN, error) {
	if !h.Live() {
		return capturedVLANs(h)
	}
	c, err := netlink.Dial(h.Host, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.BridgeVLANs()
}

func capturedVLANs(h *Host) (map[string][]PortVLAN, error) {
	text, err := h.Read(bridgeVLANs)
	if err != nil {
		return nil, unlessAbsent(err)
	}
	out := map[string][]PortVLAN{}
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		id, err := strconv.Atoi(words[1])
		if err != nil {
			return nil, fmt.Errorf("%s: %q is no VLAN", h.Path(bridgeVLANs), words[1])
		}
		out[words[0]] = append(out[words[0]], PortVLAN{
			ID: id, PVID: slices.Contains(words[2:], "pvid"), Untagged: slices.Contains(words[2:], "untagged"),
		})
	}
	return out, nil
}

// vlansText is what a snapshot has of the VLANs of bridges' ports; nil if there are none.
func vlansText(h *Host) ([]byte, error) {
	all, err := portVLANs(h)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, name := range slices.Sorted(maps.Keys(all)) {
		for _, v := range all[name] {
			out = fmt.Append(out, name, " ", v.ID)
			if v.PVID {
				out = append(out, " pvid"...)
			}
			if v.Untagged {
				out = append(out, " untagged"...)
			}
			out = append(out, '\n')
		}
	}
	return out, nil
}

// bridges adds the host's bridges with their ports, and the interfaces that are VLANs of others.
func (c *capture) bridges() {
	all, err := Bridges(c.h)
	if err != nil && !isRefusal(err) {
		c.keep(err)
		return
	}
	for _, b := range all {
		real := c.linked(path.Join(netClass, b.Name))
		c.files(real, bridgeFiles)
		c.dir(path.Join(real, "brif"))
		c.links(path.Join(real, "brif"))
	}
	c.files("", []string{vlanConfig})
	text, err := vlansText(c.h)
	if err != nil && !isRefusal(err) {
		c.keep(err)
	}
	c.add(bridgeVLANs, text)
}
