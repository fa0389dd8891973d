package sriov

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// RangeError says that a PF cannot have so many VFs.
type RangeError struct {
	PF          iommu.Address
	Want, Total int
	Hint        string
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("%s can have 0 to %d VFs, not %d%s", e.PF, e.Total, e.Want, e.Hint)
}

// NotPFError says that a device has no VFs to make.
type NotPFError struct {
	Device iommu.Address
	VFOf   *iommu.Address // it is a VF itself
	Hint   string
}

func (e *NotPFError) Error() string {
	if e.VFOf != nil {
		return fmt.Sprintf("%s is a VF of %s; name the PF", e.Device, e.VFOf)
	}
	return fmt.Sprintf("%s is not a PF: it has no SR-IOV capability%s", e.Device, e.Hint)
}

func notPF(h *iommu.Host, d *iommu.Device) error {
	return &NotPFError{d.Address, d.PhysFn, firmwareHint(h, d)}
}

// firmwareHint names the firmware setting that decides how many VFs a card has, for the makers whose cards hide the
// capability or lower its total by one; current values where devlink tells. Where others than makers of NICs hide it,
// the setup of the board decides.
func firmwareHint(h *iommu.Host, d *iommu.Device) string {
	switch d.Vendor {
	case 0x15b3:
		return " (its firmware decides: mlxconfig settings SRIOV_EN and NUM_OF_VFS; a change takes effect with the " +
			"next boot" + devlinkParam(h, d, "enable_sriov") + ")"
	case 0x8086:
		return " (the firmware decides: SR-IOV of the board, and in the setup of the card's own ROM \"virtualization " +
			"mode\" or \"SR-IOV\"; a change takes effect with the next boot)"
	case 0x1002, 0x1022, 0x1dd8:
		return " (the firmware decides: \"SR-IOV support\" in the setup of the board; a change takes effect with " +
			"the next boot)"
	case 0x1924, 0x10ee:
		return " (its firmware decides: sfboot vf-count=N; a change takes effect with the next boot)"
	case 0x14e4:
		return " (its firmware decides: NVM options of bnxtnvm, or devlink parameter enable_sriov; a change takes " +
			"effect with the next boot" + devlinkParam(h, d, "enable_sriov") + ")"
	}
	return ""
}

// silentCause is why a driver makes no VFs and reports success, where that is known.
func silentCause(pf *iommu.Device) string {
	if pf.Driver == "bnxt_en" {
		return " (bnxt_en makes none while the interface is down: ip link set dev " + strings.Join(pf.Netdevs,
			" ") + " up)"
	}
	return ""
}

// NotVFError says that a device is not a VF.
type NotVFError struct{ Device iommu.Address }

func (e *NotVFError) Error() string { return fmt.Sprintf("%s is not a VF", e.Device) }

// ForecastError says that the kernel would refuse to make so many VFs, before anything is touched.
type ForecastError struct {
	PF   iommu.Address
	Want int
	Why  string
}

func (e *ForecastError) Error() string {
	return fmt.Sprintf("%s cannot have %d VFs: %s", e.PF, e.Want, e.Why)
}

const noRoom = "turn on SR-IOV and \"Above 4G decoding\" in the firmware, or boot with pci=realloc"

// forecast looks at what sriov_enable of drivers/pci/iov.c is going to: memory ranges and bus numbers.
func forecast(h *iommu.Host, pf *iommu.Device, n int) error {
	ranges, err := h.Read(attribute(pf.Address, "resource"))
	if err != nil && !host.Absent(err) {
		return err
	}
	// Six BARs and the ROM come before, bridge windows after (include/linux/pci.h)
	const firstVF, afterVFs = 7, 13
	for i, line := range strings.Split(string(ranges), "\n") {
		f := strings.Fields(line)
		if i >= firstVF && i < afterVFs && len(f) == 3 && hexNumber(f[0]) == 0 && hexNumber(f[2]) != 0 {
			return &ForecastError{
				pf.Address,
				n,
				"the firmware reserved no memory range for its VFs' BAR " + strconv.Itoa(i-firstVF) + " " +
					"(" + noRoom + ")",
			}
		}
	}

	offset, err1 := h.Int(attribute(pf.Address, "sriov_offset"))
	stride, err2 := h.Int(attribute(pf.Address, "sriov_stride"))
	if err1 != nil || err2 != nil {
		// The kernel knows better.
		return nil
	}
	a := pf.Address
	last := int(a.Bus) + (int(a.Device)<<3+int(a.Function)+offset+stride*(n-1))>>8
	place, err := h.Link(path.Join("sys/bus/pci/devices", pf.Name))
	if err != nil {
		return err
	}

	highest, err := h.Int(path.Join("sys/bus/pci/devices", path.Base(path.Dir(place)), "subordinate_bus_number"))
	if err == nil && last > highest {
		return &ForecastError{
			pf.Address,
			n,
			fmt.Sprintf(
				"the last VF would be on bus %02x, and the bridge above has bus numbers up to %02x (boot with "+
					"pci=realloc or pci=assign-busses, or use another slot)",
				last,
				highest,
			),
		}
	}
	return nil
}

// vectorsLeft refuses more interrupt vectors for new VFs than the PF has to give (sriov_vf_total_msix).
func vectorsLeft(h *iommu.Host, pf *iommu.Device, vfs []VFWish) error {
	need := 0
	for _, vf := range vfs {
		n, _ := strconv.Atoi(vf.Settings[MSIX])
		need += n
	}
	if need == 0 {
		return nil
	}

	pool, err := h.Int(attribute(pf.Address, "sriov_vf_total_msix"))
	if err != nil || pool == 0 {
		// Its driver has no such pool, and will say so.
		return nil
	}
	if need > pool {
		return &ForecastError{
			pf.Address,
			len(vfs),
			fmt.Sprintf("they would have %d interrupt vectors in all, and it has %d for its VFs", need, pool),
		}
	}
	return nil
}

func hexNumber(text string) uint64 {
	n, _ := strconv.ParseUint(text, 0, 64)
	return n
}

// explain adds the likely hint to the errnos of a write to sriov_numvfs (drivers/pci/iov.c, sriov_numvfs_store).
func explain(h *iommu.Host, err error, p *Plan) error {
	refuses := "driver " + p.PF.Driver + " refuses that"
	assigned := refuses + ": the e-switch may belong to the SmartNIC's own host"
	if p.Have > 0 {
		assigned = refuses + " while it regards a VF as assigned to a guest: end the guest, and take the VF off pciback"
	}

	for errno, hint := range map[unix.Errno]string{
		unix.ENOMEM: "there is no room for the VFs' memory ranges or bus numbers: " + noRoom,
		unix.ENOENT: "driver " + p.PF.Driver + " cannot make VFs",
		unix.ERANGE: fmt.Sprintf("its driver now allows less than the %d VFs it did", p.Want),
		unix.EBUSY:  "something else made VFs at the same time: see viaduct vf list " + p.PF.Name,
		unix.EPERM:  assigned,
		unix.EAGAIN: "the card is busy, e.g. with a reset: try again in a moment",
		unix.ENOSPC: "the card has not enough queues or interrupts left for so many: make fewer, or take some from " +
			"the PF (ethtool -L), RDMA or other functions",
		unix.EINVAL: refuses + " in its present state: make fewer, or turn off what it does not support beside VFs, " +
			"e.g. DCB, XDP or filters",
		unix.EOPNOTSUPP: refuses + ": SR-IOV may be off in the card's firmware" + firmwareHint(h, p.PF),
		unix.EIO:        "the card and its firmware do not agree about its VFs: boot again, or update its firmware",
	} {
		if errors.Is(err, errno) {
			return fmt.Errorf("%w (%s)", err, hint)
		}
	}
	return err
}
