package sriov

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// Eswitch is how the switch between a PF, its VFs and the wire works. A field is "" where the driver has no such choice, and
// in what is to be set, where it is to stay.
type Eswitch struct {
	Mode   string `json:"mode,omitempty"`        // legacy or switchdev
	Inline string `json:"inline_mode,omitempty"` // how much of a packet's head goes along to the NIC
	Encap  string `json:"encap,omitempty"`       // none or basic: whether tunnels can be offloaded
}

// The modes by the kernel's numbers (include/uapi/linux/devlink.h).
var (
	EswitchModes = []string{"legacy", "switchdev"}
	InlineModes  = []string{"none", "link", "network", "transport"}
	EncapModes   = []string{"none", "basic"}
)

const (
	legacy, switchdev = "legacy", "switchdev"

	attrEswitchMode, attrInlineMode, attrEncapMode = 25, 26, 62
)

// modeFirst are the drivers that change the mode only while there are no VFs. The others want the VFs to be there, without
// drivers, when the mode becomes switchdev.
var modeFirst = []string{"ice", "i40e"}

func (e *Eswitch) String() string {
	var words []string
	for _, w := range [][2]string{{"mode", e.Mode}, {"inline-mode", e.Inline}, {"encap-mode", e.Encap}} {
		if w[1] != "" {
			words = append(words, w[0], w[1])
		}
	}
	return strings.Join(words, " ")
}

func (e *Eswitch) command(device string) string {
	return fmt.Sprintf("devlink dev eswitch set pci/%s %s", device, e)
}

// differs is what has to be set to get from now to e, and what undoes that.
func (e *Eswitch) differs(now *Eswitch) (set, back Eswitch) {
	field := func(want, is string, set, back *string) {
		if want != "" && want != is {
			*set, *back = want, is
		}
	}
	field(e.Mode, now.Mode, &set.Mode, &back.Mode)
	field(e.Inline, now.Inline, &set.Inline, &back.Inline)
	field(e.Encap, now.Encap, &set.Encap, &back.Encap)
	return set, back
}

// askEswitch makes a devlink request about a device, with attributes beside its name.
func askEswitch(command uint8, bus, device string, attributes ...nl.NetlinkRequestData) ([]byte, error) {
	family, err := netlink.GenlFamilyGet(nl.GENL_DEVLINK_NAME)
	if err != nil {
		return nil, err
	}
	k, err := dial(unix.NETLINK_GENERIC)
	if err != nil {
		return nil, err
	}
	defer k.close()
	req := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	req.AddData(&nl.Genlmsg{Command: command, Version: nl.GENL_DEVLINK_VERSION})
	req.AddData(nl.NewRtAttr(nl.DEVLINK_ATTR_BUS_NAME, nl.ZeroTerminated(bus)))
	req.AddData(nl.NewRtAttr(nl.DEVLINK_ATTR_DEV_NAME, nl.ZeroTerminated(device)))
	for _, a := range attributes {
		req.AddData(a)
	}
	return k.ask(req)
}

// readEswitch asks for a device's e-switch: nil if it has none.
func readEswitch(bus, device string) (*Eswitch, error) {
	answer, err := askEswitch(nl.DEVLINK_CMD_ESWITCH_GET, bus, device)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) { // the first: no devlink at all
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("devlink %s/%s: %w", bus, device, err)
	}
	if len(answer) < nl.SizeofGenlmsg {
		return nil, nil
	}
	return decodeEswitch(answer[nl.SizeofGenlmsg:]), nil
}

// decodeEswitch reads the attributes of a devlink answer.
func decodeEswitch(b []byte) *Eswitch {
	e := &Eswitch{}
	name := func(names []string, n int) string {
		if n < len(names) {
			return names[n]
		}
		return fmt.Sprint(n)
	}
	attributes(b, func(kind uint16, v []byte) {
		switch {
		case kind == attrEswitchMode && len(v) >= 2:
			e.Mode = name(EswitchModes, int(native.Uint16(v)))
		case kind == attrInlineMode && len(v) >= 1:
			e.Inline = name(InlineModes, int(v[0]))
		case kind == attrEncapMode && len(v) >= 1:
			e.Encap = name(EncapModes, int(v[0]))
		}
	})
	return e
}

// setEswitch sets what is not "", and reads it back.
func setEswitch(bus, device string, want Eswitch) error {
	var set []nl.NetlinkRequestData
	if i := slices.Index(EswitchModes, want.Mode); i >= 0 {
		set = append(set, nl.NewRtAttr(attrEswitchMode, nl.Uint16Attr(uint16(i))))
	}
	if i := slices.Index(InlineModes, want.Inline); i >= 0 {
		set = append(set, nl.NewRtAttr(attrInlineMode, nl.Uint8Attr(uint8(i))))
	}
	if i := slices.Index(EncapModes, want.Encap); i >= 0 {
		set = append(set, nl.NewRtAttr(attrEncapMode, nl.Uint8Attr(uint8(i))))
	}
	if _, err := askEswitch(nl.DEVLINK_CMD_ESWITCH_SET, bus, device, set...); err != nil {
		return fmt.Errorf("set the e-switch of %s/%s to %s: %w", bus, device, &want, err)
	}
	now, err := readEswitch(bus, device)
	if err != nil || now == nil {
		return errors.Join(err, fmt.Errorf("%s/%s has no e-switch any more", bus, device))
	}
	if left, _ := want.differs(now); left != (Eswitch{}) {
		return fmt.Errorf("%s/%s: the e-switch was set to %s and is %s", bus, device, &want, now)
	}
	return nil
}

// ReadEswitch asks for a PF's e-switch: nil if it has none, as on a captured host.
func ReadEswitch(h *iommu.Host, pf *iommu.Device) (*Eswitch, error) {
	if !h.Live() {
		return nil, nil
	}
	return readEswitch("pci", pf.Name)
}

// Ports are the interfaces of an e-switch.
type Ports struct {
	Uplinks []string       // what stands for the wires
	VFs     map[int]string // representors, by VF
}

// ReadPorts finds the interfaces of the e-switch of a PF's interface: they have its switch id, and say in their port name whom
// they stand for (p0 a wire; pf0vf1 a VF, behind c1 one of another host; net/devlink/port.c).
func ReadPorts(h *iommu.Host, port *Port) (Ports, error) {
	out := Ports{VFs: map[int]string{}}
	if port == nil || port.SwitchID == "" {
		return out, nil
	}
	names, err := h.Names(netClass)
	if err != nil {
		return out, err
	}
	for _, n := range names {
		id, err1 := h.String(path.Join(netClass, n, "phys_switch_id"))
		name, err2 := h.String(path.Join(netClass, n, "phys_port_name"))
		if err1 != nil || err2 != nil || id != port.SwitchID {
			continue // gone, or no port of a switch
		}
		switch pf, vf, kind := parsePortName(name); {
		case kind == wire:
			out.Uplinks = append(out.Uplinks, n)
		case kind == representor && pf == int(port.PF.Address.Function):
			out.VFs[vf] = n
		}
	}
	return out, nil
}

const (
	wire        = 'p'
	representor = 'v'
)

// parsePortName reads p0, p0s1 and l1p0, which are wires, and pf0vf1. All other ports, of other hosts too, are of no kind.
func parsePortName(s string) (pf, vf int, kind rune) {
	var rest string
	if n, _ := fmt.Sscanf(s, "pf%dvf%d%s", &pf, &vf, &rest); n == 2 {
		return pf, vf, representor
	}
	if strings.HasPrefix(s, "l") {
		_, s, _ = strings.Cut(s[1:], "p")
		s = "p" + s
	}
	if n, _ := fmt.Sscanf(s, "p%d%s", &pf, &rest); n == 1 || n == 2 && strings.HasPrefix(rest, "s") {
		return pf, 0, wire
	}
	return 0, 0, 0
}
