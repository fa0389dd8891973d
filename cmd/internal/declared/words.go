package declared

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// Words say what it takes to bring the item where it is to be, for people: a line for each thing. What is the same of
// many VFs is said once.
func (i *Item) Words() []string {
	switch {
	case i.State != Differs || i.Device == nil:
		return nil
	case i.with != nil:
		return []string{"goes with " + i.with.Device.Name}
	case i.unit != nil:
		return i.deviceWords()
	}

	var out []string
	if p := i.count; p != nil {
		out = countWords(p)
	}
	return append(out, i.vfWords()...)
}

// deviceWords are those of a device that is taken.
func (i *Item) deviceWords() []string {
	driver := i.driver
	text := "taken for guests"
	switch {
	case i.Device.VFIO:
		text = "stays on " + i.Device.Driver
	case i.Device.Driver != "":
		text += ", from " + i.Device.Driver
	}
	if driver != bind.Auto && driver != i.Device.Driver {
		text += ", on " + driver
	}
	if i.owner != nil {
		text += ", nodes owned by " + i.owner.Text
	}
	return append([]string{text}, Along("takes", i.unit, i.Device)...)
}

// Along says what goes with the devices that are named, of a unit, where a verb is done to it: what is a guest's, and
// what is only kept off the host's drivers.
func Along(verb string, unit []*iommu.Device, named ...*iommu.Device) []string {
	var takes, keeps []*iommu.Device
	for _, d := range unit {
		switch {
		case slices.Contains(named, d):
		case d.Role() == iommu.RoleCompanion:
			keeps = append(keeps, d)
		default:
			takes = append(takes, d)
		}
	}
	var out []string
	for _, part := range []struct {
		what    string
		devices []*iommu.Device
	}{{"also " + verb + ": ", takes}, {"keeps off the host's drivers: ", keeps}} {
		if len(part.devices) > 0 {
			out = append(out, part.what+nouns(part.devices))
		}
	}
	return out
}

// nouns counts devices by what people call them: USB, SATA, 3 NICs.
func nouns(devices []*iommu.Device) string {
	count := map[string]int{}
	var order []string
	for _, d := range devices {
		noun := nounOf(d)
		if count[noun]++; count[noun] == 1 {
			order = append(order, noun)
		}
	}
	for n, noun := range order {
		if many := count[noun]; many > 1 {
			plural := map[bool]string{true: "s"}[strings.ToUpper(noun) != noun || noun == "NIC" || noun == "GPU"]
			order[n] = strconv.Itoa(many) + " " + noun + plural
		}
	}
	return strings.Join(order, ", ")
}

func nounOf(d *iommu.Device) string {
	if !d.PCI {
		return d.Name
	}
	switch name := iommu.ClassName(d.Class); {
	case d.Class>>16 == 0x02:
		return "NIC"
	case d.Class>>16 == 0x03:
		return "GPU"
	case name == "nvme":
		return "NVMe"
	case slices.Contains([]string{"usb", "sata", "sas", "raid", "scsi", "ide", "iommu"}, name):
		return strings.ToUpper(name)
	case name == "smbus":
		return "SMBus"
	default:
		return name
	}
}

// countWords are what changes of a PF itself.
func countWords(p *sriov.Plan) []string {
	var out []string
	switch {
	case p.Have == p.Want:
	case p.Want == 0:
		out = append(out, fmt.Sprintf("removes its %s", vfCount(p.Have)))
	case p.Have == 0:
		out = append(out, "makes "+vfCount(p.Want))
	default:
		out = append(out, fmt.Sprintf("removes its %s and makes %d", vfCount(p.Have), p.Want))
	}
	for _, up := range p.Up {
		out = append(out, "brings "+up.Name+" up")
	}
	for _, mtu := range p.Raise {
		out = append(out, fmt.Sprintf("raises the MTU of %s from %d to %d", mtu.Name, mtu.From, mtu.To))
	}
	for _, o := range p.Offload {
		state := map[bool]string{true: "on", false: "off"}[o.On]
		out = append(out, fmt.Sprintf("turns hw-tc-offload of %s %s", o.Name, state))
	}
	for _, part := range [][2]string{
		{"mode", p.Eswitch.Mode}, {"inline-mode", p.Eswitch.Inline}, {"encap", p.Eswitch.Encap},
	} {
		if part[1] != "" {
			out = append(out, "sets the e-switch's "+part[0]+" to "+part[1])
		}
	}
	return out
}

func vfCount(n int) string {
	if n == 1 {
		return "1 VF"
	}
	return strconv.Itoa(n) + " VFs"
}

// vfRow is what changes of a VF, by what it is said of.
type vfRow struct {
	index int
	parts map[string]string
}

// is begins the key of what a part of a row is now, where that is known.
const is = "is "

// vfWords are what changes of the VFs: all of those that are made, and else what differs, and what that is now.
func (i *Item) vfWords() []string {
	declared := i.pf.Each()
	rows := vfRows{}
	if p := i.count; p != nil && p.Have != p.Want {
		for n, vf := range declared {
			if vf.Pool != "" {
				rows.at(n)["pool"] = vf.Pool
			}
		}
		rows.made(p)
	}
	for _, s := range i.sets {
		rows.set(s, declared[s.VF.VFIndex].Settings)
	}
	drivers := map[string][]*iommu.Device{string(sriov.UseNone): i.none, string(sriov.UseHome): i.home}
	maps.Copy(drivers, i.take)
	for use, vfs := range drivers {
		for _, vf := range vfs {
			parts := rows.at(vf.VFIndex)
			parts["driver"], parts[is+"driver"] = use, cmp.Or(vf.Driver, bind.None)
		}
	}
	return rows.words()
}

// CountWords say what a plan of a number of VFs changes: of the PF itself, and the VFs that are made.
func CountWords(p *sriov.Plan) []string {
	rows := vfRows{}
	if p.Have != p.Want {
		rows.made(p)
	}
	return append(countWords(p), rows.words()...)
}

// SetWords say what plans change of the settings of a PF's VFs. What was requested of a VF may say it shorter than what
// that came to: stable.
func SetWords(plans []*sriov.SetPlan, requested func(vf int) sriov.Settings) []string {
	rows := vfRows{}
	for _, p := range plans {
		rows.set(p, requested(p.VF.VFIndex))
	}
	return rows.words()
}

// vfRows are what changes of VFs, by index.
type vfRows map[int]map[string]string

func (r vfRows) at(n int) map[string]string {
	if r[n] == nil {
		r[n] = map[string]string{}
	}
	return r[n]
}

// made are VFs that are made.
func (r vfRows) made(p *sriov.Plan) {
	for n, vf := range p.VFs {
		parts := r.at(n)
		for k, v := range vf.Settings {
			parts[string(k)] = v
		}
		if vf.Use == sriov.UseHome {
			parts["driver"] = "home"
		} else if driver := vf.Use.Driver(); driver != "" && parts["pool"] == "" {
			parts["driver"] = driver
		}
	}
}

// set is a VF that is set.
func (r vfRows) set(p *sriov.SetPlan, requested sriov.Settings) {
	for _, change := range p.Settings {
		for _, k := range change.Keys {
			if v, wanted := p.Want[k]; wanted && change.From[k] != v {
				parts := r.at(p.VF.VFIndex)
				parts[string(k)] = cmp.Or(requested[k], v)
				if now, known := change.From[k]; known {
					parts[is+string(k)] = now
				}
			}
		}
	}
}

func (r vfRows) words() []string {
	var sorted []vfRow
	for _, n := range slices.Sorted(maps.Keys(r)) {
		sorted = append(sorted, vfRow{n, r[n]})
	}
	return foldRows(sorted)
}

// foldRows says the same of VFs that follow on each other once: vf0-15: vlan 100-115, mac stable, pool net.
func foldRows(rows []vfRow) []string {
	var out []string
	for len(rows) > 0 {
		n := 1
		for n < len(rows) && follows(rows[0], rows[n-1], rows[n]) {
			n++
		}
		out = append(out, rowWords(rows[0], rows[n-1]))
		rows = rows[n:]
	}
	return out
}

// follows reports whether a VF's row continues those from first to last: each value is the same, or a number that grows
// with the index.
func follows(first, last, next vfRow) bool {
	if next.index != last.index+1 || len(next.parts) != len(first.parts) {
		return false
	}
	for k, from := range first.parts {
		to, known := next.parts[k]
		a, err1 := strconv.Atoi(from)
		b, err2 := strconv.Atoi(to)
		counts := err1 == nil && err2 == nil && b-a == next.index-first.index && last.parts[k] != from
		// The second one says whether they count.
		starts := last.index == first.index && err1 == nil && err2 == nil && b == a+1
		same := to == from && last.parts[k] == from
		if !known || !same && !counts && !starts {
			return false
		}
	}
	return true
}

// span is what goes from one value to another.
func span(from, to string) string {
	if from == to {
		return from
	}
	return from + "-" + to
}

func rowWords(first, last vfRow) string {
	text := fmt.Sprintf("vf%d", first.index)
	if last.index > first.index {
		text += fmt.Sprintf("-%d", last.index)
	}
	var parts []string
	add := func(key string) {
		from, known := first.parts[key]
		if !known {
			return
		}
		value := span(from, last.parts[key])
		if now, known := first.parts[is+key]; known {
			value += " (is " + span(now, last.parts[is+key]) + ")"
		}
		parts = append(parts, strings.ReplaceAll(key, "_", " ")+" "+value)
	}
	for _, k := range sriov.Keys() {
		add(string(k))
	}
	add("driver")
	add("pool")
	if len(parts) == 0 {
		return text + ": as made, without a driver"
	}
	return text + ": " + strings.Join(parts, ", ")
}
