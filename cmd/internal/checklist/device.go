package checklist

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"viaduct/cmd/internal/guest"
	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio"
)

// unit is whether an IOMMU is in front of a device.
func (c *list) unit(d *iommu.Device) error {
	file := path.Join(devicesDir, d.Name, "iommu")
	name, err := c.host.LinkBase(file)
	l := Line{
		Name: "unit", Device: d.Name, Answer: OK, Text: name + " is in front of it", Evidence: []Evidence{{file, name}},
	}
	switch {
	case err == nil:
	case !host.Absent(err):
		return err
	case d.Group == nil:
		l.Answer, l.Text, l.Hint = No, "no IOMMU is in front of it", "viaduct doctor "+d.Name
	default:
		l.Answer, l.Text = Unknown, "which IOMMU is in front of it is not told"
	}
	c.add(l)
	return nil
}

// group is whether its group can be handed over.
func (c *list) group(d *iommu.Device) error {
	l := Line{Name: "group", Device: d.Name, Answer: OK}
	if d.Group == nil {
		l.Answer, l.Text = No, "it is in no IOMMU group"
		l.Evidence, l.Hint = []Evidence{{path.Join(devicesDir, d.Name, "iommu_group"), ""}}, "viaduct bind "+d.Name
		c.add(l)
		return nil
	}

	g, err := c.topology.Group(*d.Group)
	if err != nil {
		return err
	}

	file := fmt.Sprintf("sys/kernel/iommu_groups/%d/devices", g.ID)
	l.Evidence = []Evidence{{file, fmt.Sprintf("%d of them", len(g.Devices))}}
	l.Text = fmt.Sprintf("group %d can be handed over: no host driver has any of it", g.ID)
	if blockers := g.Blockers(); len(blockers) > 0 {
		l.Answer, l.Evidence = No, nil
		var names []string
		for _, b := range blockers {
			names = append(names, b.Name)
			l.Evidence = append(l.Evidence, Evidence{path.Join(devicesDir, b.Name, "driver"), b.Driver})
		}
		l.Text = fmt.Sprintf("group %d cannot be handed over: the host uses %s of it", g.ID, strings.Join(names, ", "))
		l.Hint = "viaduct bind " + d.Name
	}

	if g.NoIOMMU {
		l.Answer, l.Hint = No, "viaduct doctor"
		l.Text = fmt.Sprintf("group %d is of VFIO's noiommu mode, which does not keep the device from any memory", g.ID)
	}

	c.add(l)
	return nil
}

// driver is whether a VFIO driver has it.
func (c *list) driver(d *iommu.Device) error {
	l := Line{
		Name: "driver", Device: d.Name, Answer: OK, Text: d.Driver + " has it",
		Evidence: []Evidence{{path.Join(devicesDir, d.Name, "driver"), d.Driver}},
	}
	switch {
	case d.VFIO:
	case c.lease.OwnDriver && !d.Blocks():
		l.Text = "the guest's VMM has its own driver for it"
	case d.Driver == "":
		l.Answer, l.Text, l.Hint = No, "no driver has it", "viaduct bind "+d.Name
	default:
		l.Answer, l.Text, l.Hint = No, d.Driver+" has it, which is not a VFIO driver", "viaduct bind "+d.Name
	}
	c.add(l)
	return nil
}

// regions is whether the guest can have its memory where it wants it, of each group once.
func (c *list) regions() error {
	seen := map[int]bool{}
	for _, d := range c.devices {
		if d.Group == nil || seen[*d.Group] {
			continue
		}
		seen[*d.Group] = true
		all, err := iommu.ReservedRegions(c.host, *d.Group)
		if err != nil {
			return err
		}
		c.add(c.reserved(d, all))
	}
	return nil
}

func (c *list) reserved(d *iommu.Device, all []iommu.Region) Line {
	l := Line{Name: "memory", Device: d.Name, Answer: OK}
	file := path.Join("sys/kernel/iommu_groups", strconv.Itoa(*d.Group), "reserved_regions")
	for _, r := range all {
		text := fmt.Sprintf("%#x-%#x %s", r.Start, r.End, r.Type)
		if r.Type == "direct" {
			l.Answer, l.Text = No, "the firmware keeps a range of memory for it, and the kernel gives it to no guest"
			l.Evidence, l.Hint = []Evidence{{file, text}}, "viaduct doctor "+d.Name
			return l
		}
		if r.Type == "reserved" {
			l.Evidence = append(l.Evidence, Evidence{file, text})
		}
	}

	if len(l.Evidence) == 0 {
		l.Text, l.Evidence = "no range is kept from the guest's memory", []Evidence{{file, "none that counts"}}
		return l
	}

	memory := c.memory()
	if memory == 0 {
		l.Answer, l.Text = Unknown, "the guest's memory is not known, and some ranges are kept from it"
		l.Hint = fmt.Sprintf("viaduct why guest=%s --memory SIZE", quote(c.lease.Guest))
		return l
	}

	l.Text = "the ranges that are kept from it are not where the guest has its memory"
	for _, r := range all {
		for _, span := range guest.Layout(c.arch(), memory, true) {
			if r.Type == "reserved" && span.Overlaps(vfio.Range{First: r.Start, Last: r.End}) {
				l.Answer, l.Text = No, "the guest would have memory in a range that is kept from it"
				l.Evidence = []Evidence{{file, fmt.Sprintf("%#x-%#x %s", r.Start, r.End, r.Type)}}
				l.Hint = "give the guest less memory"
			}
		}
	}

	return l
}

// arch is the host's, as GOARCH.
func (c *list) arch() string {
	if arch, _ := c.host.String("proc/sys/kernel/arch"); strings.HasPrefix(arch, "aarch64") {
		return "arm64"
	}
	return "amd64"
}
