package vfio

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

func deviceAt(t *testing.T, h *iommu.Host, address string) *iommu.Device {
	t.Helper()
	a, err := iommu.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	d, err := iommu.ReadDevice(h, a)
	return new(must(t, d, err))
}

func claim(t *testing.T, h *iommu.Host, devices ...*iommu.Device) *Claim {
	t.Helper()
	c, err := NewClaim(h, devices...)
	return must(t, c, err)
}

// withoutGroups is a kernel without CONFIG_VFIO_GROUP.
func withoutGroups(t *testing.T, k *hosttest.Kernel, h *iommu.Host) {
	t.Helper()
	names, err := h.Names("sys/class/vfio")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		for _, dir := range []string{"sys/class/vfio", "dev/vfio"} {
			if err := os.RemoveAll(filepath.Join(k.Dir(), dir, n)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A claim is refused while anybody has the device, by whatever way, and keeps everybody from it while it lasts.
func TestClaim(t *testing.T) {
	for _, groups := range []bool{true, false} {
		eachWay(t, func(t *testing.T, way Way) {
			k, _, h := newVFIO(t)
			if !groups {
				withoutGroups(t, k, h)
				way = IOMMUFD
			}
			d, beside := deviceAt(t, h, nic), deviceAt(t, h, other)

			opened, err := newContext(t, h, Options{Way: way}).Open(nic)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := NewClaim(h, beside, d); !errors.Is(err, ErrInUse) {
				t.Errorf("while it is open: %v", err)
			}
			if err := errors.Join(claim(t, h, beside).Close(), opened.Close()); err != nil {
				t.Fatal(err)
			}

			claim := claim(t, h, d, beside)
			if _, err := newContext(t, h, Options{Way: way}).Open(nic); !errors.Is(err, ErrInUse) {
				t.Errorf("opened while it is claimed: %v", err)
			}
			if _, err := NewClaim(h, d); !errors.Is(err, ErrInUse) {
				t.Errorf("claimed twice: %v", err)
			}
			if err := errors.Join(claim.Close(), claim.Close()); err != nil {
				t.Error(err)
			}
			if _, err := newContext(t, h, Options{Way: way}).Open(nic); err != nil {
				t.Errorf("after the claim: %v", err)
			}
		})
	}
}

// A device's own node that is open and bound to nothing does not show; and a device on no VFIO driver is not claimed.
func TestClaimOfUnbound(t *testing.T) {
	k, _, h := newVFIO(t)
	fd, err := h.OpenNode("dev/vfio/devices/vfio0", unix.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := claim(t, h, deviceAt(t, h, nic)).Close(); err != nil {
		t.Error(err)
	}

	if err := k.Write("sys/bus/pci/drivers/vfio-pci/unbind", other); err != nil {
		t.Fatal(err)
	}
	if _, err := NewClaim(h, deviceAt(t, h, other)); !errors.Is(err, ErrNotBound) {
		t.Errorf("of a device without a driver: %v", err)
	}
}
