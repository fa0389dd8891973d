package iommu

import (
	"slices"
	"strings"

	"viaduct/internal/journal"
)

// migration adds what tells whether a guest can come here, or leave, beside the CPU: the memory, KVM, bridges, the
// firmware of network cards, and whose devices are whose.
func (c *capture) migration() {
	c.files("", []string{
		"proc/meminfo", "sys/module/kvm_amd/parameters/nested", "sys/module/kvm_intel/parameters/nested",
		"sys/devices/system/cpu/online",
	})
	c.bridges()
	text, err := firmwareText(c.h)
	if err != nil && !isRefusal(err) {
		c.keep(err)
	}
	c.add(firmwares, text)

	if c.redact != nil {
		// Guests have names.
		return
	}
	// A guest's lease names its devices and addresses; the words of its VMM, which may hold secrets, are no part of it.
	for _, dir := range []string{journal.Dir, "var/lib/viaduct"} {
		names, err := c.h.Names(dir)
		if err != nil {
			continue
		}
		c.files(dir, slices.DeleteFunc(names, func(n string) bool { return !strings.HasPrefix(n, "lease-") }))
		c.dir(dir)
	}
}
