package iommu

import (
	"encoding/json"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/internal/journal"
)

// Fact is what a snapshot holds beside the host's files: something that the kernel or a look at the host told, which no
// file has. Each package has facts of its own, and reads them back with [Host.Fact].
type Fact struct {
	Name string // of the file below the snapshot's folder of facts, as "sriov/0000:01:00.0.json"
	Data []byte
}

// factsDir is where a snapshot has facts. Other versions of viaduct have less of them, or more.
const factsDir = "viaduct"

// Fact reads a fact of a captured host; false if it has none of this name. A running host has none: it is asked itself.
func (h *Host) Fact(name string) ([]byte, bool, error) {
	if h.Live() {
		return nil, false, nil
	}
	b, err := h.Read(path.Join(factsDir, name))
	if host.Absent(err) {
		return nil, false, nil
	}
	return b, err == nil, err
}

// facts adds when the host was captured, and the facts. A snapshot that is made of a captured host has that host's.
func (c *capture) facts(facts []Fact) {
	if !c.h.Live() {
		c.filesBelow(factsDir, 2)
		return
	}
	now, _ := c.h.Now()
	b, err := json.Marshal(now)
	c.keep(err)
	c.add(host.MomentFile, b)
	for _, f := range facts {
		c.add(path.Join(factsDir, f.Name), f.Data)
	}
}

// filesBelow adds the files of a folder, and of those in it, down to a depth.
func (c *capture) filesBelow(dir string, deep int) {
	names, err := c.h.Names(dir)
	if err != nil {
		c.files("", []string{dir})
		return
	}
	for _, n := range names {
		if deep > 0 {
			c.filesBelow(path.Join(dir, n), deep-1)
		}
	}
}

// records is what viaduct itself has written down, by the beginnings of its names: what is in force, leases, what is in
// quarantine, and what was last requested of VFs.
var records = [...]struct {
	dir      string
	prefixes []string
}{
	{journal.Dir, []string{"asked-", "hold.json", "lease-", "unmanaged-"}},
	{"var/lib/viaduct", []string{"confirmed.yaml", "in-force.json", "lease-", "quarantine-", "unconfirmed.json"}},
}

// records adds them, and what tells whether a quarantine has ended with the boot it was in.
func (c *capture) records() {
	for _, r := range records {
		names, err := c.h.Names(r.dir)
		if err != nil {
			continue
		}
		c.files(r.dir, slices.DeleteFunc(names, func(n string) bool {
			return !slices.ContainsFunc(r.prefixes, func(p string) bool { return strings.HasPrefix(n, p) })
		}))
	}
	c.files("", []string{"proc/sys/kernel/bootloader_type"})
}
