package hosttest

import (
	"fmt"
	"maps"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
)

// SR-IOV as drivers/pci/iov.c has it.

// numvfs is sriov_numvfs_store.
func (k *Kernel) numvfs(pf, value string) error {
	n, err := parseU16(value)
	switch have := len(k.vfs(pf)); {
	case err != nil:
		return err
	case n > k.number(pf, "sriov_totalvfs"):
		return syscall.ERANGE
	case n == have:
		return nil
	case k.driver(pf) == "" || strings.Contains(k.driver(pf), "vfio") && !k.EnableSRIOV || k.driver(pf) == "pci-stub":
		// No driver, or one without sriov_configure.
		return syscall.ENOENT
	case n == 0:
		k.removeVFs(pf)
		return nil
	case have != 0:
		return syscall.EBUSY
	}
	if k.Partial > 0 {
		n = min(n, k.Partial)
	}
	return k.addVFs(pf, n)
}

// parseU16 is kstrtou16 with base 0.
func parseU16(s string) (int, error) {
	s, base := strings.TrimPrefix(s, "+"), 10
	if hex, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		s, base = hex, 16
	} else if len(s) > 1 && s[0] == '0' {
		base = 8
	}
	n, err := strconv.ParseUint(s, base, 16)
	if err != nil {
		return 0, syscall.EINVAL
	}
	return int(n), nil
}

// addVFs is sriov_enable: the bus numbers are checked before anything is made.
func (k *Kernel) addVFs(pf string, n int) error {
	offset, stride := k.number(pf, "sriov_offset"), k.number(pf, "sriov_stride")
	first, err := routingID(path.Base(pf))
	k.must(err)
	for i := range n {
		if rid := first.rid + offset + stride*i; rid > 0xffff {
			return syscall.ENOMEM
		} else if k.exists(path.Join(sysDevices, first.with(rid))) {
			k.fatal("VF %d of %s would have the address of %s", i, path.Base(pf), first.with(rid))
		}
	}
	for i := range n {
		k.addVF(pf, i, first.with(first.rid+offset+stride*i))
	}
	k.put(pf+"/sriov_numvfs", strconv.Itoa(n)+"\n")
	return nil
}

// addVF is pci_iov_add_virtfn: device, links, and only then the driver.
func (k *Kernel) addVF(pf string, index int, address string) {
	vf := path.Join(path.Dir(pf), address)
	vendor, device := k.text(pf, "vendor"), "0x"+zeros(k.text(pf, "sriov_vf_device"), 4)
	sub, subdev, class := k.text(pf, "subsystem_vendor"), k.text(pf, "subsystem_device"), k.text(pf, "class")
	id := func(s string) string { return zeros(strings.ToUpper(strings.TrimPrefix(s, "0x")), 8) }
	bits := id(class)[2:]
	for name, content := range map[string]string{
		"vendor": vendor, "device": device, "subsystem_vendor": sub, "subsystem_device": subdev, "class": class,
		"revision": k.text(pf, "revision"), "numa_node": k.text(pf, "numa_node"), "driver_override": "(null)",
		"modalias": fmt.Sprintf("pci:v%sd%ssv%ssd%sbc%ssc%si%s", id(vendor), id(device), id(sub), id(subdev),
			bits[:2], bits[2:4], bits[4:]),
	} {
		if content != "" {
			k.put(path.Join(vf, name), content+"\n")
		}
	}

	if path.Dir(vf) != sysDevices {
		k.link(path.Join(sysDevices, address), vf)
	}
	k.must(os.MkdirAll(k.at("sys/bus/pci"), 0o755))
	k.link(vf+"/subsystem", "sys/bus/pci")
	if target, err := os.Readlink(k.at(pf + "/iommu")); err == nil {
		k.must(os.Symlink(target, k.at(vf+"/iommu")))
	}
	if k.exists(pf + "/iommu_group") {
		group := 0
		for k.exists(path.Join(sysGroups, strconv.Itoa(group))) {
			group++ // the lowest that is free: ida_alloc
		}
		dir := path.Join(sysGroups, strconv.Itoa(group))
		k.put(dir+"/type", "DMA\n")
		k.put(dir+"/reserved_regions", "0x00000000fee00000 0x00000000feefffff msi\n")
		k.link(path.Join(dir, "devices", address), vf)
		k.link(vf+"/iommu_group", dir)
	}

	if k.exists(pf + "/sriov_vf_total_msix") {
		k.put(vf+"/sriov_vf_msix_count", "")
	}
	if k.ResetVFs {
		k.put(vf+"/reset", "")
		k.put(vf+"/reset_method", "flr\n")
	}
	k.link(fmt.Sprintf("%s/virtfn%d", pf, index), vf)
	k.link(vf+"/physfn", pf)
	k.putConfig(vf)
	if driver := k.driver(pf); strings.Contains(driver, "vfio") {
		// vfio_pci_bus_notifier.
		k.put(vf+"/driver_override", driver+"\n")
	}
	k.probeAll(vf)
}

// zeros fills a number up to so many digits.
func zeros(s string, digits int) string { return strings.Repeat("0", max(0, digits-len(s))) + s }

// removeVFs is sriov_disable.
func (k *Kernel) removeVFs(pf string) {
	for i, vf := range k.vfs(pf) {
		k.must(os.Remove(k.at(fmt.Sprintf("%s/virtfn%d", pf, i))))
		k.must(os.Remove(k.at(vf + "/physfn")))
		if k.driver(vf) != "" {
			k.unbind(vf)
		}
		for _, m := range []map[string]Tree{k.home, k.classes} {
			// The next VF there is another.
			maps.DeleteFunc(m, func(key string, _ Tree) bool { return strings.HasPrefix(key, path.Base(vf)+" ") })
		}
		if group, err := k.resolve(vf + "/iommu_group"); err == nil {
			k.must(os.Remove(k.at(path.Join(group, "devices", path.Base(vf)))))
			if len(k.names(group+"/devices")) == 0 {
				k.must(os.RemoveAll(k.at(group)))
			}
		}

		if path.Dir(vf) != sysDevices {
			k.must(os.Remove(k.at(path.Join(sysDevices, path.Base(vf)))))
		}
		k.must(os.RemoveAll(k.at(vf)))
	}

	k.forgetVFs(pf)
	k.put(pf+"/sriov_numvfs", "0\n")
}

// vfs are the directories of a PF's VFs by index.
func (k *Kernel) vfs(pf string) []string {
	var out []string
	for {
		vf, err := k.resolve(fmt.Sprintf("%s/virtfn%d", pf, len(out)))
		if err != nil {
			return out
		}
		out = append(out, vf)
	}
}

// routing is an address as the bus sees it.
type routing struct {
	domain string
	rid    int // bus<<8 | device<<3 | function
}

func routingID(address string) (routing, error) {
	i := strings.LastIndexByte(address, ':')
	j := strings.LastIndexByte(address[:max(i, 0)], ':')
	var bus, device, function int
	if j < 0 {
		return routing{}, fmt.Errorf("%q is no PCI address", address)
	}
	_, err := fmt.Sscanf(address[j+1:], "%02x:%02x.%x", &bus, &device, &function)
	return routing{address[:j], bus<<8 | device<<3 | function}, err
}

func (r routing) with(rid int) string {
	return fmt.Sprintf("%s:%02x:%02x.%x", r.domain, rid>>8, rid>>3&31, rid&7)
}

// vectors is sriov_vf_msix_count_store. A PF without any to share has a driver that does not know of them.
func (k *Kernel) vectors(vf, value string) error {
	pf, err := k.resolve(vf + "/physfn")
	k.must(err)
	n, err := strconv.Atoi(value)
	switch total := k.number(pf, "sriov_vf_total_msix"); {
	case err != nil || n < 0:
		return syscall.EINVAL
	case total == 0:
		return syscall.EOPNOTSUPP
	case k.driver(vf) != "":
		return syscall.EBUSY
	case n > total:
		return syscall.ENOSPC
	}
	return nil
}
