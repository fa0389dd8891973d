package doctor

import (
	"fmt"
	"slices"
	"strings"

	"viaduct/iommu"
)

// memlock checks that who runs this may lock a guest's memory.
func memlock(f *Facts) Check {
	c := Check{Name: "memlock", Title: "locked memory"}
	const file = "proc/self/limits"
	const small = 1 << 30
	switch {
	case !f.LockKnown:
		return f.unseen(c, file)
	case f.LockLimit == nil:
		c.set(Passed, "this user may lock all memory; other users have limits")
	case *f.LockLimit < small:
		c.see(file, fmt.Sprintf("Max locked memory %d bytes", *f.LockLimit))
		c.set(Warned, "this user may lock %d MiB, less than a guest has; libvirt raises the limit by itself",
			*f.LockLimit>>20)
		c.Hint = "for VMMs of this user: a line `USER - memlock unlimited` in /etc/security/limits.d/vfio.conf, or " +
			"LimitMEMLOCK=infinity in their service"
	default:
		c.see(file, fmt.Sprintf("Max locked memory %d bytes", *f.LockLimit))
		c.set(Passed, "this user may lock %d MiB", *f.LockLimit>>20)
	}
	return c
}

// nodes checks the files that VMMs open.
func nodes(f *Facts) Check {
	c := Check{Name: "nodes", Title: "VFIO nodes"}
	var open []string
	for _, n := range f.Nodes {
		// The container gives access to nothing by itself: the kernel makes it for all.
		if n.Mode&0o002 != 0 && n.Path != "dev/vfio/vfio" {
			open = append(open, "/"+n.Path)
			c.see(n.Path, fmt.Sprintf("mode %04o", n.Mode))
		}
	}

	has := func(path string) bool {
		return slices.ContainsFunc(f.Nodes, func(n Node) bool { return n.Path == path })
	}

	loaded := f.Modules["vfio"].Loaded || f.Modules["vfio"].Builtin
	switch {
	case len(open) > 0:
		c.set(Warned, "every user can open %s, and with it a device", some(open))
		c.Hint = "run `chmod o-w` on them, and correct the udev rule that does this (/etc/udev/rules.d)"
	case has("dev/vfio/vfio") || has("dev/iommu"):
		c.set(Passed, "there, and not open to all")
	case !f.Live:
		c.set(Unknown, "not known: a capture has no nodes")
		c.see("dev/vfio", "")
	case loaded:
		c.set(Warned, "VFIO is loaded, and there is neither /dev/vfio/vfio nor /dev/iommu")
		c.see("dev/vfio/vfio", "")
		c.Hint = "see that /dev is a devtmpfs, and run `udevadm trigger`"
	default:
		c.set(Passed, "they come with the first device that is taken")
	}

	return c
}

// sriovRoom checks that VFs have room in memory and on buses.
func sriovRoom(f *Facts) Check {
	c := Check{Name: "sriov_room", Title: "room for VFs"}
	asked := func(name string) bool {
		return f.Selected == nil || slices.ContainsFunc(f.Selected,
			func(d *iommu.Device) bool { return d.Name == name })
	}

	var memory, buses []string
	count := 0
	for _, pf := range f.PFs {
		if !asked(pf.Name) {
			continue
		}
		count++
		if pf.Unmapped {
			memory = append(memory, pf.Name)
			c.see("sys/bus/pci/devices/"+pf.Name+"/resource", "no memory for VFs")
		}
		if pf.Buses >= 0 && pf.LastBus > pf.Buses {
			buses = append(buses, pf.Name)
			c.see("sys/bus/pci/devices/"+pf.Port+"/subordinate_bus_number", itoa(pf.Buses))
		}
	}

	c.Devices = slices.Concat(memory, buses)
	switch {
	case len(memory) > 0:
		c.set(Warned, "the firmware left no memory for the VFs of %s", some(memory))
		c.Hint = "turn on \"SR-IOV support\" and \"Above 4G decoding\" in the firmware's menu; else " +
			f.Loader.Add("pci=realloc")
	case len(buses) > 0:
		c.set(Warned, "the VFs of %s are on buses that the port above does not have", some(buses))
		c.Hint = "turn on \"SR-IOV support\" and \"ARI\" in the firmware's menu; else " +
			f.Loader.Add("pci=assign-busses")
	case count == 0:
		c.set(Passed, "none of these devices can have VFs")
	default:
		c.set(Passed, "enough for the VFs of %s", plural(count, "device"))
	}

	if f.Selected != nil && c.Status == Warned {
		c.Status = Failed
	}

	return c
}

// resets checks that a device can be reset between two guests.
func resets(f *Facts) Check {
	c := Check{Name: "reset", Title: "reset"}
	var problems []string
	unknown := false
	for _, d := range f.Wanted {
		r, known := f.Resets[d.Name]
		if !known || d.IsBridge() {
			continue
		}
		unknown = unknown || r.Way == iommu.ResetUnknown
		has := func(o *iommu.Device) bool {
			return slices.ContainsFunc(f.Wanted, func(w *iommu.Device) bool { return w.Name == o.Name }) ||
				o.Together(d)
		}
		if problem := r.Problem(has); problem != "" {
			problems = append(problems, d.Name+": "+problem)
			c.Devices = append(c.Devices, d.Name)
			value := strings.Join(r.Methods, " ")
			if value == "" && r.Methods != nil {
				value = "empty"
			}
			c.see("sys/bus/pci/devices/"+d.Name+"/reset_method", value)
		}
	}

	switch {
	case len(problems) > 0:
		c.set(Warned, "%s", strings.Join(problems, "; "))
		c.Hint = "give away all functions that are reset together, or another device; what a guest leaves in one " +
			"that is not reset, the next one finds"
	case unknown:
		c.set(Unknown, "not known of every device")
	case len(f.Wanted) == 0:
		c.set(Passed, "no device was asked about, and none is on a vfio driver")
	default:
		c.set(Passed, "%s can be reset", some(namesOf(f.Wanted)))
	}

	return c
}

// power checks that no device is lost in a deep sleep.
func power(f *Facts) Check {
	c := Check{Name: "power", Title: "power state"}
	const idle = "sys/module/vfio_pci/parameters/disable_idle_d3"
	for _, d := range f.Wanted {
		if s := f.Power[d.Name]; s == "D3cold" || s == "error" {
			c.Devices = append(c.Devices, d.Name)
			c.see("sys/bus/pci/devices/"+d.Name+"/power_state", s)
		}
	}
	if len(c.Devices) == 0 {
		c.set(Passed, "no device is in D3cold")
		return c
	}
	c.set(Warned, "%s in D3cold: some devices do not come back from that", some(c.Devices))
	c.Hint = "`echo 0 > /sys/bus/pci/devices/" + c.Devices[0] + "/d3cold_allowed` before it is bound, and " +
		"`options vfio-pci disable_idle_d3=1` in /etc/modprobe.d"
	if v, is := f.Params[idle]; is {
		c.see(idle, v)
	}
	return c
}

// bootDisplay checks that the host's screen is not on a device that a guest is to have.
func bootDisplay(f *Facts) Check {
	c := Check{Name: "boot_display", Title: "host's screen"}
	if f.Blind != "" {
		c.set(Unknown, "%s", f.Blind)
		c.Hint = "run this as root"
		return c
	}
	if len(f.Displays) == 0 {
		c.set(Passed, "on none of these devices")
		return c
	}
	var text []string
	for _, d := range f.Displays {
		text = append(text, d.Device+" "+d.What)
		if !slices.Contains(c.Devices, d.Device) {
			c.Devices = append(c.Devices, d.Device)
		}
	}
	c.set(Warned, "%s", strings.Join(text, "; "))
	for _, d := range f.Displays {
		c.see(d.File, d.Value)
	}
	c.Hint = "let the firmware start on another card (\"primary display\"); else " +
		f.Loader.Add("initcall_blacklist=sysfb_init")
	return c
}

// hugePages says whether guests can have huge pages.
func hugePages(f *Facts) Check {
	c := Check{Name: "huge_pages", Title: "huge pages"}
	var text, used []string
	for _, h := range f.HugePages {
		if h.Total > 0 {
			if h.Free == 0 {
				used = append(used, fmt.Sprintf("%d of %d MiB", h.Total, h.Size>>20))
			}
			text = append(text, fmt.Sprintf("%d of %d free of %d MiB", h.Free, h.Total, h.Size>>20))
			c.see(fmt.Sprintf("sys/kernel/mm/hugepages/hugepages-%dkB/nr_hugepages", h.Size>>10), itoa(h.Total))
		}
	}
	c.set(Passed, "%s", strings.Join(text, ", "))
	if len(used) > 0 && len(used) == len(text) {
		c.set(Warned, "every reserved page is in use (%s), so the next guest that uses huge pages does not start",
			strings.Join(used, ", "))
		c.Hint = "reserve more (`sysctl vm.nr_hugepages=N`, or hugepages= at boot), or start that guest without them"
	}
	if len(text) == 0 && len(f.HugePages) == 0 {
		return f.unseen(c, "sys/kernel/mm/hugepages")
	}
	if len(text) == 0 {
		c.see("sys/kernel/mm/hugepages/*/nr_hugepages", "0")
		c.set(Passed, "none are reserved; a guest that uses huge pages needs them (vm.nr_hugepages, or hugepages= "+
			"at boot)")
	}
	return c
}

// numa checks that it is known which node a device is near to.
func numa(f *Facts) Check {
	c := Check{Name: "numa", Title: "NUMA"}
	const file = "sys/devices/system/node/online"
	switch f.NUMANodes {
	case 0:
		return f.unseen(c, file)
	case 1:
		c.set(Passed, "one node")
		c.see(file, "0")
		return c
	}

	for _, d := range f.Wanted {
		if d.PCI && d.NUMANode == nil {
			c.Devices = append(c.Devices, d.Name)
			c.see("sys/bus/pci/devices/"+d.Name+"/numa_node", "-1")
		}
	}

	if len(c.Devices) == 0 {
		c.set(Passed, "%d nodes", f.NUMANodes)
		for _, d := range f.Wanted {
			if d.NUMANode != nil {
				c.Text += fmt.Sprintf(", %s at node %d", d.Name, *d.NUMANode)
				break
			}
		}
		return c
	}

	c.set(Warned, "%d nodes, and the firmware does not say which one %s is near to", f.NUMANodes, some(c.Devices))
	c.Hint = "update the firmware; until then, pin the guest by hand to the node of the card's slot"
	return c
}
