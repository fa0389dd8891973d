package acpi

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"viaduct/internal/host/hosttest"
)

// realTables are the tables of real machines that are at hand, by name: those beside the project, and those in the
// folders of VIADUCT_ACPI_TABLES.
func realTables(t testing.TB) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	folders := append(filepath.SplitList(os.Getenv("VIADUCT_ACPI_TABLES")), "../../../shared/acpi-tables")
	for _, folder := range folders {
		files, err := filepath.Glob(filepath.Join(folder, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if len(b) > 4 && slices.Contains(Signatures, string(b[:4])) {
				out[f] = b
			}
		}
	}
	if len(out) == 0 {
		t.Logf("no tables of real machines are in %q", folders)
	}
	return out
}

// Each table at hand decodes to its end, and says what iasl says of it.
func TestIASL(t *testing.T) {
	program, err := exec.LookPath("iasl")
	if err != nil {
		t.Log("there is no iasl (Debian: acpica-tools) to compare with: tables are decoded only")
	}
	// Older ones have other names for fields, and read some entries wrongly.
	const oldest = 20230628
	if program != "" {
		if v := versionOf(t, program); v < oldest {
			t.Logf("this iasl is of %d, and one from %d on is needed (there is no iasl that can be compared with): tables are "+
				"decoded only", v, oldest)
			program = ""
		}
	}
	tables := realTables(t)
	maps.Copy(tables, hosttest.ACPITables())
	fields := 0
	for name, b := range tables {
		table, err := Parse(b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if program == "" {
			continue
		}
		fields += compare(t, name, table, disassemble(t, program, b))
	}
	t.Logf("%d tables, %d fields compared", len(tables), fields)
}

// versionOf is the day of a version of iasl, e.g. 20250404.
func versionOf(t *testing.T, program string) int {
	t.Helper()
	out, err := exec.Command(program, "-v").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(out), "version ")
	n, err := strconv.Atoi(strings.Fields(rest + " ?")[0])
	if err != nil {
		t.Fatalf("iasl -v says %q", out)
	}
	return n
}

// said is a line of iasl: a field, or, without a place, a part of the field before it.
type said struct {
	offset, size int // -1: a part
	name, value  string
}

func disassemble(t *testing.T, program string, table []byte) []said {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "table.dat")
	if err := os.WriteFile(file, table, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(program, "-p", filepath.Join(dir, "out"), "-d", file).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", program, err, out)
	}
	text, err := os.ReadFile(filepath.Join(dir, "out.dsl"))
	if err != nil {
		t.Fatal(err)
	}

	var lines []said
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "Raw Table Data") {
			break
		}
		place, rest, found := strings.Cut(line, "]")
		s := said{offset: -1}
		if !found || !strings.HasPrefix(place, "[") {
			rest = line
		} else if n, _ := fmt.Sscanf(place, "[%xh %d %xh", new(int), &s.offset, &s.size); n != 3 {
			continue
		}
		s.name, s.value, found = strings.Cut(rest, " : ")
		if !found || strings.HasPrefix(line, "*") {
			continue
		}
		s.name = strings.TrimSpace(s.name)
		if s.value = strings.TrimSpace(s.value); !strings.HasPrefix(s.value, `"`) {
			s.value, _, _ = strings.Cut(s.value, " [")
		}
		lines = append(lines, s)
	}
	return lines
}

// field is one that was decoded, at its place in the table.
type field struct {
	kind, name string
	size       int
	value      reflect.Value
}

// alike are iasl's names of fields and flags that have others here; those that differ only in blanks, in what is in
// brackets, or in their ends are not listed. "" is one that stands for something else here.
var alike = map[string]string{
	"Table Length": "Length", "Asl Compiler ID": "CreatorID", "Asl Compiler Revision": "CreatorRevision",
	"Virtualization Info": "Info", "Subtable Type": "Type", "Device Scope Type": "Type", "Entry Length": "Length",
	"PCI Segment Group": "Segment", "PCI Segment Number": "Segment", "PCI Segment": "Segment",
	"Feature Reporting": "Features", "EFR Image": "EFR", "Auxiliary Data": "LastID", "Start Address": "Start",
	"Memory Length": "Size", "Data Setting": "Setting", "Source Used Device ID": "SourceID",
	"Extended Data": "Extended", "ACPI HID": "HID", "ACPI CID": "CID", "Register Base Address": "RegisterBase",
	"End Address": "Limit", "PCI Bus Number": "StartBus", "PCI Path": "Path", "Device Name": "ObjectName",
	"DeviceId": "DeviceID", "IVHD/Reserved": "EFR2", "RMRR/Base Address": "Base", "RHSA/Base Address": "RegisterBase",
	"named component/Device Name": "Device", "Node Flags": "Flags", "Memory Size Limit": "AddressBits",
	"ATS Attribute": "ATS", "PASID Capabilities": "PASID", "Device ID Mapping Index": "IDMappingIndex",
	"SMMUv3/Proximity Domain": "Proximity",
	"Page 0 Base Address":     "Page0Base", "Page 1 Base Address": "Page1Base",
	"Overflow Interrupt GSIV":   "OverflowGSIV",
	"Number of RMR Descriptors": "Count", "RMR Descriptor Offset": "Offset", "Base Address of RMR": "Base",
	"Length of RMR": "Size", "PCI Segment start": "SegmentStart", "PCI Segment end": "SegmentEnd",
	"PCI BDF start": "BDFStart", "PCI BDF end": "BDFEnd", "PCI BDF number": "BDF", "NSgIrpt": "GlobalInterrupts",
	"NSgIrpt Flags": "GlobalInterrupts", "NSgCfgIrpt": "GlobalInterrupts", "NSgCfgIrpt Flags": "GlobalInterrupts",
	"Context Interrupt": "ContextInterrupts", "PMU Interrupt": "PMUInterrupts", "Memory Flags": "Flags",
	"Global Interrupt Offset": "GlobalInterruptOffset", "Oem ID": "OEMID", "Memory Properties": "Memory",

	"Prefetch Support": "PreFSup", "Readable": "IR", "Writeable": "IW", "System MGMT": "SysMgt",
	"Proximity Domain Valid": "ProximityValid", "Remapping Permitted": "RemapPermitted",
	"Access Privileged": "AccessPrivilege", "Ensured Coherency of Accesses": "EnsuredCoherency",
	"DeviceID Valid": "DeviceIDValid",
}

// same reports whether a name of iasl's, of a field of a block or entry, is that of a field here.
func same(kind, theirs, ours string) bool {
	theirs, _, _ = strings.Cut(theirs, " (")
	if alike[kind+"/"+theirs] == ours || alike[theirs] == ours {
		return true
	}
	plain := func(s string) string { return strings.ToLower(strings.ReplaceAll(s, " ", "")) }
	return plain(theirs) == plain(ours) || strings.TrimRight(plain(ours), "012") == plain(theirs)
}

// compare says how many fields of iasl's were found in the table with the same place, size, name and value.
func compare(t *testing.T, name string, table *Table, lines []said) int {
	t.Helper()
	fields := flat(table)
	var last field
	for _, line := range lines {
		where := fmt.Sprintf("%s: iasl has %q: %s at %#x", name, line.name, line.value, line.offset)
		if line.offset < 0 {
			comparePart(t, where, last, line)
			continue
		}
		if line.name == "Padding" || line.name == "Optional Padding" || strings.HasPrefix(line.value, "[") {
			// The last stand for the fields that follow.
			continue
		}
		f, found := fields[line.offset]
		if f.kind == "IVMD" && f.name == "Segment" {
			// Of older specifications: the segment and what is still reserved.
			f = field{kind: "IVMD", name: "Reserved", size: 8, value: reflect.ValueOf(f.value.Uint())}
		}
		last = f
		switch {
		case !found:
			t.Errorf("%s, and here nothing begins there", where)
		case f.size != line.size || !same(f.kind, line.name, f.name):
			t.Errorf("%s, %d bytes, and here that is %s, %d bytes", where, line.size, f.name, f.size)
		case !equal(f.value, line.value):
			t.Errorf("%s, and here it is %v", where, f.value)
		}
	}

	return len(lines)
}

// comparePart compares a flag, or a field of some bits, which has a name here only if it is not zero.
func comparePart(t *testing.T, where string, of field, line said) {
	t.Helper()
	if line.name == "Size (pages, log2)" || !of.value.IsValid() || of.name == "GlobalInterrupts" {
		return
	}
	flags, ok := reflect.TypeAssert[interface{ Names() []string }](of.value)
	if !ok {
		t.Errorf("%s, and %s has no flags here", where, of.name)
		return
	}
	value, err := strconv.ParseUint(line.value, 16, 64)
	if err != nil {
		t.Errorf("%s: %v", where, err)
	}
	set := slices.ContainsFunc(flags.Names(), func(n string) bool {
		n, number, more := strings.Cut(n, "=")
		theirs := alike[line.name]
		if theirs == "" {
			theirs = strings.ReplaceAll(line.name, " ", "")
		}
		return strings.HasPrefix(strings.ToLower(theirs), strings.ToLower(n)) &&
			(!more || number == strconv.FormatUint(value, 10) || line.name == "HTTU Override")
	})
	if set != (value != 0) && line.name != "Reserved" {
		t.Errorf("%s, and set here are %v", where, flags.Names())
	}
}

func equal(v reflect.Value, value string) bool {
	if text, quoted := strings.CutPrefix(value, `"`); quoted {
		text, _, _ = strings.Cut(text, `"`)
		ours := strings.Map(func(r rune) rune { return map[bool]rune{true: r, false: ' '}[unicode.IsPrint(r)] },
			v.String())
		return strings.TrimRight(ours, " ") == strings.TrimRight(text, " ")
	}
	digits := strings.NewReplacer(" ", "", ",", "").Replace(value)
	switch v.Kind() {
	case reflect.String: // a number, or none
		n, err := strconv.ParseUint(digits, 16, 64)
		return err == nil && (v.String() == Hex(n).String() || v.String() == "" && n == 0)
	case reflect.Slice:
		text := ""
		for i := range v.Len() {
			text += fmt.Sprintf("%02X", v.Index(i).Uint())
		}
		return text == digits
	case reflect.Struct: // a Step
		return fmt.Sprintf("%02X%02X", v.Field(0).Uint(), v.Field(1).Uint()) == digits
	}
	n, err := strconv.ParseUint(digits, 16, 64)
	return err == nil && n == v.Uint()
}

// flat is all that was decoded of a table, by its place.
func flat(table *Table) map[int]field {
	f := flattener{out: map[int]field{}, kind: "header", skip: -1}
	f.walk(reflect.ValueOf(table.Header))
	f.walk(reflect.ValueOf(table.Fields).Elem())
	head := map[string][2]int{"IVRS": {1, 1}, "DMAR": {2, 4}, "IORT": {1, 3}, "VIOT": {1, 1}}[table.Signature]
	for _, b := range table.Blocks {
		f.kind, f.block = b.Name, b.Offset
		f.put(b.Offset, "Type", head[0], reflect.ValueOf(uint64(b.Type)))
		length := map[string]int{"IORT": 1}[table.Signature]
		if length == 0 {
			length = 2
		}
		f.put(b.Offset+length, "Length", 2, reflect.ValueOf(uint64(b.Length)))
		f.at, f.skip = b.Offset+head[1], b.Offset+length
		if b.Fields != nil {
			f.walk(reflect.ValueOf(b.Fields).Elem())
		}
		for _, e := range b.Entries {
			f.kind, f.at, f.skip = e.Name, e.Offset, -1
			if e.Type >= 0 {
				f.put(e.Offset, "Type", 1, reflect.ValueOf(uint64(e.Type)))
				f.at++
			}
			if _, scope := e.Fields.(*Scope); scope {
				f.put(f.at, "Length", 1, reflect.ValueOf(uint64(e.Length)))
				f.at++
			}
			f.walk(reflect.ValueOf(e.Fields).Elem())
		}
	}

	return f.out
}

type flattener struct {
	out             map[int]field
	kind            string
	at, skip, block int // skip is where the length stands, among the fields
}

func (f *flattener) put(at int, name string, size int, v reflect.Value) {
	f.out[at] = field{f.kind, name, size, v}
}

// walk puts the fields of a struct one after the other, as they stand in the table.
func (f *flattener) walk(v reflect.Value) {
	sizes := map[string]int{"Signature": 4, "OEMID": 6, "OEMTableID": 8, "CreatorID": 4, "HID": 8, "CID": 8}
	for i := range v.NumField() {
		name, value := v.Type().Field(i).Name, v.Field(i)
		if f.at == f.skip {
			f.at += 2
		}

		if value.Kind() == reflect.Pointer {
			if value.IsNil() {
				// Of the other types.
				continue
			}
			value = value.Elem()
		}
		size := int(value.Type().Size())

		if name == "Reserved" && f.kind == "ANDD" {
			value, size = reflect.ValueOf(uint64(0)), 3
		}

		switch {
		case name == "Reserved" && value.Kind() == reflect.Slice && value.Len() == 6:
			value, size = reflect.ValueOf(uint64(0)), 6
		case strings.HasSuffix(name, "Interrupts"):
			f.interrupts(v, name)
			continue
		case value.Kind() == reflect.Struct:
			f.walk(value)
			continue
		case value.Kind() == reflect.String:
			if size = sizes[name]; name == "UID" {
				size = int(v.FieldByName("UIDLength").Uint())
			} else if size == 0 {
				size = value.Len() + 1
			}
		case name == "Path" || name == "Identifiers":
			for j := range value.Len() {
				f.put(f.at, name, int(value.Index(j).Type().Size()), value.Index(j))
				f.at += int(value.Index(j).Type().Size())
			}
			continue
		case value.Kind() == reflect.Slice:
			size = value.Len()
		}

		if size > 0 {
			f.put(f.at, name, size, value)
		}

		f.at += size
	}
}

// interrupts puts an array of an SMMU's; iasl prints the global ones in halves.
func (f *flattener) interrupts(v reflect.Value, name string) {
	at := f.block + int(v.FieldByName(strings.TrimSuffix(name, "s")+"Offset").Uint())
	list := v.FieldByName(name)
	for i := range list.Len() {
		n := list.Index(i).Uint()
		if name == "GlobalInterrupts" {
			f.put(at+8*i, name, 4, reflect.ValueOf(n&0xffffffff))
			f.put(at+8*i+4, name, 4, reflect.ValueOf(n>>32))
			continue
		}
		f.put(at+8*i, name, 8, reflect.ValueOf(n))
	}
}
