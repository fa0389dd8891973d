package sriov

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/netlink"
	"viaduct/iommu"
)

// Eswitch is how the switch between a PF, its VFs and the wire works. A field is "" where the driver has no such
// choice, and in what is to be set, where it is to stay.
type Eswitch struct {
	Mode   string `json:"mode,omitempty"`        // legacy or switchdev
	Inline string `json:"inline_mode,omitempty"` // how much of a packet's head goes along to the NIC
	Encap  string `json:"encap,omitempty"`       // none or basic: whether tunnels can be offloaded
}

const legacy, switchdev = "legacy", "switchdev"

// choice is one field of an Eswitch, with its values by the kernel's numbers (include/uapi/linux/devlink.h).
type choice struct {
	name      string // devlink(8)'s word
	attribute int
	bytes     int
	values    []string
	of        func(*Eswitch) *string
}

var choices = [...]choice{
	{
		"mode", nl.DEVLINK_ATTR_ESWITCH_MODE, 2,
		[]string{legacy, switchdev}, func(e *Eswitch) *string { return &e.Mode },
	},
	{
		"inline-mode", nl.DEVLINK_ATTR_ESWITCH_INLINE_MODE, 1,
		[]string{"none", "link", "network", "transport"}, func(e *Eswitch) *string { return &e.Inline },
	},
	{
		"encap-mode", nl.DEVLINK_ATTR_ESWITCH_ENCAP_MODE, 1,
		[]string{"none", "basic"}, func(e *Eswitch) *string { return &e.Encap },
	},
}

// EswitchModes returns the values of Mode.
func EswitchModes() []string { return slices.Clone(choices[0].values) }

// InlineModes returns the values of Inline.
func InlineModes() []string { return slices.Clone(choices[1].values) }

// EncapModes returns the values of Encap.
func EncapModes() []string { return slices.Clone(choices[2].values) }

// modeFirst are the drivers that change the mode only while there are no VFs. The others want the VFs to be there,
// without drivers, when the mode becomes switchdev.
var modeFirst = [...]string{"ice", "i40e"}

func (e *Eswitch) String() string {
	if e == nil {
		return ""
	}
	var words []string
	for _, c := range choices {
		if value := *c.of(e); value != "" {
			words = append(words, c.name, value)
		}
	}
	return strings.Join(words, " ")
}

func (e *Eswitch) command(device string) string {
	return fmt.Sprintf("devlink dev eswitch set pci/%s %s", device, e)
}

// differs is what has to be set to get from now to e, and what undoes that.
func (e *Eswitch) differs(now *Eswitch) (set, back Eswitch) {
	for _, c := range choices {
		if want, is := *c.of(e), *c.of(now); want != "" && want != is {
			*c.of(&set), *c.of(&back) = want, is
		}
	}
	return set, back
}

// askDevlink makes a devlink request about a device, with attributes beside its name.
func askDevlink(h *iommu.Host, command uint8, bus, device string, attributes ...nl.NetlinkRequestData) ([]byte, error) {
	g, err := netlink.DialGeneric(h.Host, nl.GENL_DEVLINK_NAME, nl.GENL_DEVLINK_VERSION)
	if err != nil {
		return nil, err
	}
	defer g.Close()
	names := []nl.NetlinkRequestData{
		nl.NewRtAttr(nl.DEVLINK_ATTR_BUS_NAME, nl.ZeroTerminated(bus)),
		nl.NewRtAttr(nl.DEVLINK_ATTR_DEV_NAME, nl.ZeroTerminated(device)),
	}
	return g.Ask(command, append(names, attributes...)...)
}

// readEswitch asks for a device's e-switch: nil if it has none. ENOENT says that there is no devlink at all.
func readEswitch(h *iommu.Host, bus, device string) (*Eswitch, error) {
	answer, err := askDevlink(h, nl.DEVLINK_CMD_ESWITCH_GET, bus, device)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("devlink %s/%s: %w", bus, device, err)
	}
	return decodeEswitch(answer), nil
}

// decodeEswitch reads the attributes of a devlink answer.
func decodeEswitch(b []byte) *Eswitch {
	e := &Eswitch{}
	netlink.Attributes(b, func(kind uint16, v []byte) {
		for _, c := range choices {
			if c.attribute != int(kind) || len(v) < c.bytes {
				continue
			}
			n := int(v[0])
			if c.bytes == 2 {
				n = int(native.Uint16(v))
			}
			*c.of(e) = fmt.Sprint(n)
			if n < len(c.values) {
				*c.of(e) = c.values[n]
			}
		}
	})
	return e
}

// setEswitch sets what is not "", and reads it back.
func setEswitch(h *iommu.Host, bus, device string, want Eswitch) error {
	var set []nl.NetlinkRequestData
	for _, c := range choices {
		i := slices.Index(c.values, *c.of(&want))
		switch {
		case i < 0:
		case c.bytes == 2:
			set = append(set, nl.NewRtAttr(c.attribute, nl.Uint16Attr(uint16(i))))
		default:
			set = append(set, nl.NewRtAttr(c.attribute, nl.Uint8Attr(uint8(i))))
		}
	}
	if _, err := askDevlink(h, nl.DEVLINK_CMD_ESWITCH_SET, bus, device, set...); err != nil {
		return fmt.Errorf("set the e-switch of %s/%s to %s: %w", bus, device, &want, err)
	}

	now, err := readEswitch(h, bus, device)
	if err == nil && now == nil {
		err = fmt.Errorf("%s/%s no longer has an e-switch", bus, device)
	}
	if err != nil {
		return err
	}
	if left, _ := want.differs(now); left != (Eswitch{}) {
		return fmt.Errorf("%s/%s: the e-switch was set to %s and is %s", bus, device, &want, now)
	}
	return nil
}

// ReadEswitch asks for a PF's e-switch: nil if it has none, and where a captured host does not tell of it.
func ReadEswitch(h *iommu.Host, pf iommu.Address) (*Eswitch, error) {
	e, _, err := readEswitchOf(h, pf)
	return e, err
}
