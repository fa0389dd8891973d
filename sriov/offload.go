package sriov

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// Whether a NIC may carry out the rules of its e-switch is no matter of devlink but a feature of the interface, as ethtool shows
// them (include/uapi/linux/ethtool.h).

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

// ethtool makes one request of an interface; command is a structure of the kernel's that begins with its number. It returns what
// the kernel does.
func ethtool(name string, command []uint32) (int, error) {
	var request struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	if copy(request.name[:len(request.name)-1], name) != len(name) {
		return 0, unix.ENODEV
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	request.data = unsafe.Pointer(&command[0])
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(command)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// tcOffload finds the feature: whether it is on, its bit, and how many words the features take. It is false if the interface has
// none, or the driver does not let it be changed.
func tcOffload(name string) (on bool, bit, words int, ok bool, err error) {
	info := []uint32{ethtoolSetInfo, 0, 1 << featureNames, 0, 0}
	if _, err = ethtool(name, info); err != nil {
		return false, 0, 0, false, err
	}
	count := int(info[4])
	if info[2] == 0 || count == 0 || count > maxFeatures {
		return false, 0, 0, false, nil
	}
	names := make([]uint32, 3+count*nameLength/4)
	names[0], names[1], names[2] = ethtoolStrings, featureNames, uint32(count)
	if _, err = ethtool(name, names); err != nil {
		return false, 0, 0, false, err
	}
	text := unsafe.Slice((*byte)(unsafe.Pointer(&names[3])), count*nameLength)
	bit = -1
	for i := range count {
		if s, _, _ := strings.Cut(string(text[i*nameLength:(i+1)*nameLength]), "\x00"); s == tcFeature {
			bit = i
		}
	}
	if bit < 0 {
		return false, 0, 0, false, nil
	}
	words = (count + 31) / 32
	state := make([]uint32, 2+4*words) // of each word: available, requested, active, never changed
	state[0], state[1] = ethtoolGetFeatures, uint32(words)
	if _, err = ethtool(name, state); err != nil {
		return false, 0, 0, false, err
	}
	word, mask := state[2+4*(bit/32):], uint32(1)<<(bit%32)
	return word[2]&mask != 0, bit, words, word[0]&mask != 0, nil
}

// setTCOffload turns the feature on or off, and reads it back.
func setTCOffload(name string, on bool) error {
	fail := func(err error) error { return fmt.Errorf("interface %s: set %s: %w", name, tcFeature, err) }
	is, bit, words, ok, err := tcOffload(name)
	switch {
	case err != nil:
		return fail(err)
	case is == on:
		return nil
	case !ok:
		return fail(unix.EOPNOTSUPP)
	}
	set := make([]uint32, 2+2*words) // of each word: valid, requested
	set[0], set[1] = ethtoolSetFeatures, uint32(words)
	mask := uint32(1) << (bit % 32)
	set[2+2*(bit/32)] = mask
	if on {
		set[3+2*(bit/32)] = mask
	}
	if _, err := ethtool(name, set); err != nil {
		return fail(err)
	}
	if is, _, _, _, err = tcOffload(name); err != nil || is != on {
		return fail(errors.Join(err, errors.New("the driver reported success and did not")))
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
	return fmt.Sprintf("ethtool -K %s %s %s", o.Name, tcFeature, state)
}

// offloadsBut are a PF's own interfaces whose hw-tc-offload is not as wanted: on, off, or "" for as it is.
func offloadsBut(h *iommu.Host, pf *iommu.Device, want string) ([]Offload, error) {
	var out []Offload
	if want == "" || !h.Live() {
		return nil, nil
	}
	err := byName(h, pf, func(pf *iommu.Device) error {
		out = nil
		for _, n := range ownInterfaces(h, pf) {
			is, _, _, ok, err := tcOffload(n)
			if err != nil {
				return fmt.Errorf("interface %s: %s: %w", n, tcFeature, err)
			}
			if is == (want == on) {
				continue
			}
			if !ok {
				return fmt.Errorf("interface %s: driver %s does not let %s be changed", n, pf.Driver, tcFeature)
			}
			out = append(out, Offload{n, want == on})
		}
		return nil
	})
	return out, err
}
