package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/iommu"
	"viaduct/iommu/acpi"
)

func iommuCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:  "iommu",
		Usage: "show the IOMMUs, and what the firmware says about them",
		Description: "Show which devices each IOMMU covers, what it can do and what that means\n" +
			"for passthrough, and what the firmware reserves for which device. An IOMMU\n" +
			"that the firmware describes and the kernel does not use is shown too. The\n" +
			"tables (IVRS, DMAR, IORT, VIOT) take root to read; --json has each of their\n" +
			"blocks and fields.\n\n" +
			"Examples:\n  viaduct iommu\n  viaduct iommu --json | jq '.tables[].blocks[] | {type, offset, length}'",
		Flags: []cli.Flag{e.jsonFlag()},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("iommu: it takes no argument (viaduct why SELECTOR is about one device)")
			}
			return runIOMMU(e)
		},
	})
}

// iommuReport is `iommu --json`.
type iommuReport struct {
	Present            bool             `json:"present"`
	InterruptRemapping *bool            `json:"interrupt_remapping"`
	Tables             []firmwareView   `json:"tables"`
	Units              []unitReportView `json:"units"`
	Others             []directView     `json:"other_ranges"`
}

// firmwareView is a table: the members of acpi.Table, and what is wrong with it.
type firmwareView struct {
	*iommu.Firmware
}

func (v firmwareView) MarshalJSON() ([]byte, error) {
	fault := "null"
	if v.Err != nil {
		b, err := json.Marshal(v.Err.Error())
		if err != nil {
			return nil, err
		}
		fault = string(b)
	}
	if v.Table == nil {
		return fmt.Appendf(nil, `{"signature":%q,"length":null,"revision":null,"blocks":[],"error":%s}`, v.Signature,
			fault), nil
	}
	b, err := json.Marshal(v.Table)
	if err != nil {
		return nil, err
	}
	return append(b[:len(b)-1], `,"error":`+fault+"}"...), nil
}

type unitReportView struct {
	Name      *string        `json:"name"`
	Kind      iommu.UnitKind `json:"kind"`
	Active    bool           `json:"active"`
	Table     *string        `json:"table"`
	Block     *int           `json:"block"`
	Segment   *uint32        `json:"segment"`
	Base      *acpi.Hex      `json:"base_address"`
	Function  *iommu.Address `json:"function"`
	Devices   []string       `json:"devices"`
	Described []string       `json:"table_devices"`
	Features  featuresView   `json:"features"`
	Input     *int           `json:"input_bits"`
	Physical  *int           `json:"physical_bits"`
	Registers map[string]any `json:"registers"`
	Windows   []regionView   `json:"reserved_windows"`
	Ranges    []directView   `json:"direct_ranges"`
}

type featuresView struct {
	InterruptRemapping *bool `json:"interrupt_remapping"`
	X2APIC             *bool `json:"x2apic"`
	PostedInterrupts   *bool `json:"posted_interrupts"`
	DirtyTracking      *bool `json:"dirty_tracking"`
	ATS                *bool `json:"ats"`
	PRI                *bool `json:"pri"`
	PASIDBits          *int  `json:"pasid_bits"`
	Nested             *bool `json:"nested"`
	HostTables         *bool `json:"host_tables"`
	FiveLevels         *bool `json:"five_levels"`
	SNP                *bool `json:"snp"`
	SnoopControl       *bool `json:"snoop_control"`
	Emulated           *bool `json:"emulated"`
}

type directView struct {
	regionView
	Kind      string   `json:"kind"`
	Exclusion bool     `json:"exclusion"`
	Table     string   `json:"table"`
	Offset    int      `json:"offset"`
	Whose     string   `json:"table_devices"`
	Devices   []string `json:"devices"`
}

func directOf(r *iommu.Direct) directView {
	v := directView{regionOf(r.Region), r.Kind, r.Exclusion, r.Table, r.Offset, r.Whose, []string{}}
	for _, device := range r.Devices {
		v.Devices = append(v.Devices, device.Name)
	}
	return v
}

func runIOMMU(e *env) error {
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	t, err := iommu.Scan(h)
	if errors.Is(err, fs.ErrNotExist) && !h.Live() {
		// A capture of the tables alone is enough.
		t, err = &iommu.Topology{}, nil
	}
	if err != nil {
		return err
	}
	tables := iommu.ReadFirmware(h)
	units, err := iommu.ReadUnits(h, t, tables)
	if err != nil {
		return err
	}
	if e.json {
		e.printJSON(iommuReportOf(t, tables, units))
	} else {
		e.printText(func(w *bufio.Writer) { printIOMMU(w, t, tables, units) })
	}

	if len(t.Groups) == 0 && len(t.Units) == 0 && !e.json {
		e.note("no IOMMU is active on this host: %s", iommu.WhyOff(h, t))
	}
	return nil
}

func iommuReportOf(t *iommu.Topology, tables []iommu.Firmware, units []iommu.UnitDetails) iommuReport {
	r := iommuReport{
		Present: present(t), InterruptRemapping: t.InterruptRemapping, Tables: []firmwareView{},
		Units: []unitReportView{}, Others: []directView{},
	}
	for i := range tables {
		r.Tables = append(r.Tables, firmwareView{&tables[i]})
	}
	for i := range units {
		r.Units = append(r.Units, unitReportOf(&units[i]))
	}
	others := iommu.OtherRanges(tables, units)
	for i := range others {
		r.Others = append(r.Others, directOf(&others[i]))
	}
	return r
}

func unitReportOf(u *iommu.UnitDetails) unitReportView {
	f := u.Features
	v := unitReportView{
		Name: known(u.Name), Kind: u.Kind, Active: u.Active, Table: known(u.Table), Function: u.Function,
		Devices: u.Devices, Described: u.Described, Input: f.InputBits, Physical: f.PhysicalBits,
		Features: featuresView{
			f.InterruptRemapping, f.X2APIC, f.PostedInterrupts, f.DirtyTracking, f.ATS, f.PRI, f.PASIDBits, f.Nested,
			f.HostTables, f.FiveLevels, f.SNP, f.SnoopControl, f.Emulated,
		},
		Registers: registers(u), Windows: []regionView{}, Ranges: []directView{},
	}
	if v.Devices == nil {
		v.Devices = []string{}
	}
	if u.Table != "" {
		v.Block, v.Segment = &u.Block, &u.Segment
	}
	if u.Base != 0 {
		v.Base = new(acpi.Hex(u.Base))
	}
	for _, r := range u.Windows {
		v.Windows = append(v.Windows, regionOf(r))
	}
	for i := range u.Ranges {
		v.Ranges = append(v.Ranges, directOf(&u.Ranges[i]))
	}
	return v
}

// registers are those that are known, by name.
func registers(u *iommu.UnitDetails) map[string]any {
	out := map[string]any{}
	if u.EFR != nil {
		out["efr"] = *u.EFR
	}
	if u.EFR2 != nil {
		out["efr2"] = *u.EFR2
	}
	if u.Capability != nil {
		out["capability_header"] = acpi.Hex(*u.Capability)
	}
	if u.Cap != nil {
		out["cap"] = *u.Cap
	}
	if u.ECap != nil {
		out["ecap"] = *u.ECap
	}
	return out
}

func printIOMMU(w io.Writer, t *iommu.Topology, tables []iommu.Firmware, units []iommu.UnitDetails) {
	f := fields{w}
	add := func(name, format string, a ...any) { f.add(name, "%s", wrapAt(fmt.Sprintf(format, a...), fieldWidth)) }
	remapped := "not known"
	if t.InterruptRemapping != nil {
		remapped = map[bool]string{
			true: "on", false: "off: VFIO refuses devices, as one could forge the interrupts of others",
		}[*t.InterruptRemapping]
	}
	if len(t.Units) > 0 {
		add("interrupt", "remapping is %s", remapped)
	}
	for i := range tables {
		add(tables[i].Signature, "%s", tableText(&tables[i]))
	}
	for i := range units {
		fmt.Fprintln(w)
		printUnit(w, &units[i])
	}
	others := iommu.OtherRanges(tables, units)
	if len(others) > 0 {
		fmt.Fprintln(w)
	}
	for i := range others {
		r := &others[i]
		add("direct", "%#x - %#x for %s, behind no IOMMU here: %s", r.Start, r.End, r.Whose, directText(r))
	}
}

// tableText is a table in a line.
func tableText(f *iommu.Firmware) string {
	switch {
	case errors.Is(f.Err, fs.ErrPermission):
		return "not known: reading it takes root"
	case f.Table == nil:
		return "not known: " + f.Err.Error()
	}
	kinds := map[string]int{}
	var order []string
	for _, b := range f.Table.Blocks {
		name := b.Name
		if name == "" {
			name = fmt.Sprintf("of unknown type %#x", b.Type)
		}
		if kinds[name]++; kinds[name] == 1 {
			order = append(order, name)
		}
	}
	for i, name := range order {
		order[i] = fmt.Sprintf("%d %s", kinds[name], name)
	}
	text := fmt.Sprintf("revision %d, %d bytes: %s", f.Table.Revision, f.Table.Length, strings.Join(order, ", "))
	if f.Err != nil {
		text += "; NOT SOUND: " + f.Err.Error()
	}
	return text
}

func printUnit(w io.Writer, u *iommu.UnitDetails) {
	f := fields{w}
	add := func(name, format string, a ...any) { f.add(name, "%s", wrapAt(fmt.Sprintf(format, a...), fieldWidth)) }
	name := u.Name
	if !u.Active {
		name = "not in use"
	}

	what := string(u.Kind)
	if u.Function != nil && u.Function.String() != u.Name {
		what += " at " + u.Function.String()
	} else if u.Base != 0 {
		what += " at " + acpi.Hex(u.Base).String()
	}

	if u.Table != "" {
		what += fmt.Sprintf(", %s at %#x", u.Table, u.Block)
	}

	add("unit", "%s: %s", name, what)
	if u.Active {
		add("devices", "%s", some(u.Devices))
	}
	if others := differences(u); others != "" {
		add("", "%s", others)
	}
	if u.Features.InputBits != nil {
		add("addresses", "%d bits for devices%s", *u.Features.InputBits, ofHost(u.Features.PhysicalBits))
	}

	for _, line := range featureLines(u) {
		add(line.name, "%s", line.text)
	}

	for _, r := range u.Windows {
		add("window", "%#x - %#x %s", r.Start, r.End, r.Type)
	}

	for i := range u.Ranges {
		r := &u.Ranges[i]
		var names []string
		for _, d := range r.Devices {
			names = append(names, d.Name)
		}
		add("direct", "%#x - %#x for %s: %s", r.Start, r.End, some(names), directText(r))
	}
}

func ofHost(bits *int) string {
	if bits == nil {
		return ""
	}
	return fmt.Sprintf(", %d bits of the host's", *bits)
}

func directText(r *iommu.Direct) string {
	kind := r.Kind
	if r.Exclusion {
		kind += " that is left out of translation"
	}
	switch r.Type {
	case "direct-relaxable":
		return kind + ", until their driver has them"
	case "reserved":
		return kind + ", which a guest's memory is kept off"
	}
	if r.Kind == "RMRR" && len(r.Devices) == 0 {
		return kind + ", so no guest can have what is no USB controller and no display"
	}
	return kind + ", so no guest can have them"
}

// some are the first of many names.
func some(names []string) string {
	const most = 8
	switch n := len(names); {
	case n == 0:
		return "none"
	case n <= most:
		return strings.Join(names, " ")
	default:
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], " "), n-most)
	}
}

// differences says which devices the table puts behind a unit and the kernel does not, or the other way round.
func differences(u *iommu.UnitDetails) string {
	if u.Described == nil {
		return ""
	}
	if !u.Active {
		return "it would cover " + some(u.Described)
	}

	has := func(list []string) map[string]bool {
		out := map[string]bool{}
		for _, n := range list {
			out[n] = true
		}
		return out
	}

	kernel, table := has(u.Devices), has(u.Described)
	var onlyTable, onlyKernel []string
	for _, n := range u.Described {
		if !kernel[n] {
			onlyTable = append(onlyTable, n)
		}
	}

	for _, n := range u.Devices {
		if !table[n] {
			onlyKernel = append(onlyKernel, n)
		}
	}

	var text []string
	if len(onlyTable) > 0 {
		text = append(text, "the table has "+some(onlyTable)+" too")
	}
	if len(onlyKernel) > 0 {
		text = append(text, "the table does not name "+some(onlyKernel))
	}

	return strings.Join(text, "; ")
}

type featureLine struct{ name, text string }

// featureLines says what a unit can do and what that means for who passes devices on; what is not known is left out.
func featureLines(u *iommu.UnitDetails) []featureLine {
	f, out := &u.Features, []featureLine(nil)
	add := func(name string, has *bool, yes, no string) {
		if has == nil {
			return
		}
		text := map[bool]string{true: "yes: " + yes, false: "no: " + no}[*has]
		if *has || no != "" {
			out = append(out, featureLine{name, strings.TrimSuffix(text, ": ")})
		}
	}

	posted := "AVIC"
	tracks := "live migration can ask the IOMMU what a device wrote"
	if u.Kind == iommu.KindVTd {
		posted = "posting"
		tracks += ", with intel_iommu=sm_on"
	}

	add("remapping", f.InterruptRemapping, "it can remap interrupts, without which VFIO refuses devices",
		"it cannot remap interrupts, so VFIO refuses devices behind it")
	less := "interrupts reach the first 255 processors only"
	if u.ECap != nil && u.ECap.X2APIC() {
		less += ", as the firmware asks (X2APIC_OPT_OUT; intremap=no_x2apic_optout overrides it)"
	}

	add("x2APIC", f.X2APIC, "interrupts reach all processors", less)
	add(posted, f.PostedInterrupts, "interrupts reach a running guest without the host",
		"each interrupt for a guest goes through the host")
	add("dirty pages", f.DirtyTracking, tracks, "live migration needs a device that tracks what it writes")
	add("ATS", f.ATS, "devices may keep their own translations", "devices cannot keep translations")
	add("PRI", f.PRI, "devices may touch pages that are not there yet", "all of a guest's memory must be there")
	if f.PASIDBits != nil {
		add("PASID", new(*f.PASIDBits > 0), count(*f.PASIDBits, "bit")+": several address spaces for one device",
			"one address space for each device")
	}

	add("nesting", f.Nested, "a guest's IOMMU can be backed by it", "a guest's IOMMU must be emulated")
	if f.HostTables != nil && !*f.HostTables {
		add("v1 tables", f.HostTables, "", "the kernel uses v2 page tables, which do not track what a device writes")
	}

	add("5 levels", f.FiveLevels, "page tables for 57 bits of address", "page tables for 48 bits of address")
	add("SNP", f.SNP, "for SEV-SNP guests; with SNP on, identity domains (iommu=pt) are not allowed", "")
	add("snooping", f.SnoopControl, "DMA can be kept coherent with the processors' caches",
		"a device may bypass the processors' caches")
	add("emulated", f.Emulated, "it is a hypervisor's, where mapping memory is slow", "")
	return out
}
