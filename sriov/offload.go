package sriov

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/shell"
	"viaduct/iommu"
)

// Whether a NIC may carry out the rules of its e-switch is no matter of devlink but a feature of the interface, as
// ethtool shows them (include/uapi/linux/ethtool.h).

const (
	tcFeature = "hw-tc-offload"

	ethtoolStrings     = 0x1b // ETHTOOL_GSTRINGS
	ethtoolSetInfo     = 0x37 // ETHTOOL_GSSET_INFO
	ethtoolGetFeatures = 0x3a // ETHTOOL_GFEATURES
	ethtoolSetFeatures = 0x3b // ETHTOOL_SFEATURES
	featureNames       = 4    // ETH_SS_FEATURES
	nameLength         = 32   // ETH_GSTRING_LEN
	maxFeatures        = 4096 // the kernel has some sixty
)

// ethtool makes one request of an interface; command is a structure of the kernel's that begins with its number.
func ethtool(h *iommu.Host, name string, command []uint32) error {
	var request struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	if copy(request.name[:len(request.name)-1], name) != len(name) {
		return unix.ENODEV
	}
	request.data = unsafe.Pointer(&command[0])
	_, err := h.Ioctl(-1, "ethtool "+name, unix.SIOCETHTOOL, unsafe.Pointer(&request))
	runtime.KeepAlive(command)
	return err
}

// feature is hw-tc-offload of an interface.
type feature struct {
	on         bool
	changeable bool // it is there, and the driver lets it be changed
	bit, words int  // its bit, and how many words the features take
}

// readTCOffload finds the feature.
func readTCOffload(h *iommu.Host, name string) (feature, error) {
	info := []uint32{ethtoolSetInfo, 0, 1 << featureNames, 0, 0}
	if err := ethtool(h, name, info); err != nil {
		return feature{}, err
	}
	count := int(info[4])
	if info[2] == 0 || count == 0 || count > maxFeatures {
		return feature{}, nil
	}

	names := make([]uint32, 3+count*nameLength/4)
	names[0], names[1], names[2] = ethtoolStrings, featureNames, uint32(count)
	if err := ethtool(h, name, names); err != nil {
		return feature{}, err
	}
	text := unsafe.Slice((*byte)(unsafe.Pointer(&names[3])), count*nameLength)
	f := feature{bit: -1, words: (count + 31) / 32}
	for i := range count {
		if s, _, _ := strings.Cut(string(text[i*nameLength:(i+1)*nameLength]), "\x00"); s == tcFeature {
			f.bit = i
		}
	}
	if f.bit < 0 {
		return feature{}, nil
	}

	// Of each word: available, requested, active, never changed.
	state := make([]uint32, 2+4*f.words)
	state[0], state[1] = ethtoolGetFeatures, uint32(f.words)
	if err := ethtool(h, name, state); err != nil {
		return feature{}, err
	}
	word, mask := state[2+4*(f.bit/32):], uint32(1)<<(f.bit%32)
	f.on, f.changeable = word[2]&mask != 0, word[0]&mask != 0
	return f, nil
}

// setTCOffload turns the feature of an interface of a PF on or off, and reads it back. Ioctls know names alone.
func setTCOffload(h *iommu.Host, pf iommu.Address, name string, want bool) error {
	d, err := iommu.ReadDevice(h, pf)
	if err == nil {
		err = iommu.ReadNetdevs(h, &d)
	}
	if err != nil {
		return err
	}
	return iommu.ByName(h, &d, func(now *iommu.Device) error {
		name, err := nameIn(now, name)
		if err != nil {
			return err
		}
		return setNamedTCOffload(h, name, want)
	})
}

func setNamedTCOffload(h *iommu.Host, name string, want bool) error {
	fail := func(err error) error { return fmt.Errorf("interface %s: set %s: %w", name, tcFeature, err) }
	f, err := readTCOffload(h, name)
	switch {
	case err != nil:
		return fail(err)
	case f.on == want:
		return nil
	case !f.changeable:
		return fail(unix.EOPNOTSUPP)
	}

	// Of each word: valid, requested.
	set := make([]uint32, 2+2*f.words)
	set[0], set[1] = ethtoolSetFeatures, uint32(f.words)
	mask := uint32(1) << (f.bit % 32)
	set[2+2*(f.bit/32)] = mask
	if want {
		set[3+2*(f.bit/32)] = mask
	}
	if err := ethtool(h, name, set); err != nil {
		return fail(err)
	}
	if f, err = readTCOffload(h, name); err == nil && f.on != want {
		err = errors.New("the driver reported success and did nothinghinghinghinghinghinghing")
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// Offload is an interface whose hw-tc-offload changes.
type Offload struct {
	Name string `json:"name"`
	On   bool   `json:"on"` // what it becomes
}

func (o Offload) command() string {
	state := off
	if o.On {
		state = on
	}
	return fmt.Sprintf("ethtool -K %s %s %s", shell.Quote(o.Name), tcFeature, state)
}

// offloadsBut are a PF's own interfaces whose hw-tc-offload is not as wanted: on, off, or "" for as it is. It is an
// fs.ErrNotExist where a captured host does not tell.
func offloadsBut(h *iommu.Host, pf *iommu.Device, want string) ([]Offload, error) {
	if want == "" {
		return nil, nil
	}
	if !h.Live() {
		return capturedOffloadsBut(h, pf, want == on)
	}

	var out []Offload
	err := iommu.ByName(h, pf, func(now *iommu.Device) error {
		out = nil
		for _, n := range now.Netdevs {
			f, err := readTCOffload(h, n)
			if err != nil {
				return fmt.Errorf("interface %s: %s: %w", n, tcFeature, err)
			}
			if f.on == (want == on) {
				continue
			}
			if !f.changeable {
				return fmt.Errorf("interface %s: driver %s does not allow a change of %s", n, pf.Driver, tcFeature)
			}
			out = append(out, Offload{n, want == on})
		}
		return nil
	})
	return out, err
}
