package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"viaduct/cmd/internal/migrate"
	"viaduct/cmd/internal/verify"
	"viaduct/cmd/internal/vmm"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/iommu/acpi"
	"viaduct/vfio"
	"viaduct/vfio/holder"
)

// said is what a function prints, with each run of blanks as one.
func said(print func(out *bytes.Buffer)) string {
	var out bytes.Buffer
	print(&out)
	return strings.Join(strings.Fields(out.String()), " ")
}

func wants(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// Each thing that verify finds has words of its own, and what is not known is not told as a no.
func TestVerifyTexts(t *testing.T) {
	yes, no, why := new(true), new(false), new("x y")
	for want, w := range map[string]*verify.Way{
		"": {Exists: true, Error: why}, "By container: not here: x y": {Error: why},
		"By container: it works": {OK: true, Exists: true},
		"By container: it works addresses none (39 bits) reserved 0x1-0x2 page sizes 4 KiB, 1 MiB mappings 7 more can be made map 2 MiB in pages of 4 KiB: 10µs, unmap: 0s interrupt arrives": {
			OK: true, AddressWidth: new(39), Reserved: []verify.Span{{Start: "0x1", End: "0x2"}},
			PageSizes:    []uint64{4096, 1 << 20},
			MappingsLeft: new(uint32(7)), Mapping: []verify.Timing{{Size: 2 << 20, PageSize: 4096, Map: 11000}},
			Interrupt: yes,
		},
	} {
		wants(t, "way", said(func(out *bytes.Buffer) { printWay(out, vfio.Container, w, true) }), want)
	}
	wants(t, "of no use", said(func(out *bytes.Buffer) {
		printWay(out, vfio.Container, &verify.Way{Error: why},
			false)
	}), "")

	for want, r := range map[string]*verify.Report{
		"reset worked (flr, bus) hot reset resets a, b": {Reset: verify.Reset{Worked: yes,
			Methods: []string{"flr", "bus"}, Together: []string{"a", "b"}}},
		"reset failed":        {Reset: verify.Reset{Worked: no, Error: why, Together: []string{"a"}}},
		"reset not by itself": {},
	} {
		got := said(func(out *bytes.Buffer) { printAbilities(out, r) })
		head, _, _ := strings.Cut(got, " migration")
		wants(t, "reset", head, want)
	}
	for want, m := range map[string]verify.Migration{
		"yes, also while it runs": {OK: yes, PreCopy: yes}, "yes": {OK: yes, PreCopy: no},
		"no: x y": {OK: no, Reason: why, PreCopy: yes}, "not known": {},
	} {
		got := said(func(out *bytes.Buffer) { printAbilities(out, &verify.Report{Migration: m}) })
		_, got, _ = strings.Cut(got, "migration ")
		got, _, _ = strings.Cut(got, " dirty")
		wants(t, "migration", got, want)
	}
	got := said(func(out *bytes.Buffer) {
		printAbilities(out, &verify.Report{DirtyTracking: verify.DirtyTracking{Device: verify.Ability{OK: no,
			Reason: why}, IOMMU: verify.Ability{OK: yes}}})
	})
	if !strings.HasSuffix(got, "dirty pages by the device: no: x y by the IOMMU: yes") {
		t.Errorf("dirty pages: %q", got)
	}

	for want, m := range map[string]*verify.Memory{
		"huge pages none are free": {},
		"memory 8 KiB can be mapped, at a-b huge pages none are free": {Size: 8192, OK: yes,
			Ranges: []verify.Span{{Start: "a", End: "b"}}, HugePages: []verify.Huge{{Size: 2 << 20}}},
		"memory 8 KiB cannot be mapped, at none lock limit 4 KiB huge pages 1 of 2 MiB are free, which is enough for it huge pages 2 of 1 GiB are free, which is not enough for it": {
			Size: 8192, OK: no, LockLimit: new(uint64(4096)),
			HugePages: []verify.Huge{{Size: 2 << 20, Free: 1, Enough: true}, {Size: 1 << 30, Free: 2}},
		},
	} {
		wants(t, "memory", said(func(out *bytes.Buffer) { printMemory(out, m) }), want)
	}
	wants(t, "tables", said(func(out *bytes.Buffer) {
		printTables(out, &verify.Report{
			Regions: []verify.Region{
				{Name: "BAR0", Size: 8192, Read: true, Write: true, Mappable: 8192},
				{Name: "BAR1", Size: 8192, Read: true, Mappable: 4096},
				{Name: "ROM", Size: 4096},
			},
			Interrupts: []verify.Interrupts{{Name: "MSI", Vectors: 4, Maskable: true, Fixed: true},
				{Name: "INTx", Vectors: 1}},
		})
	}), "REGION SIZE ACCESS MAPPABLE BAR0 8 KiB read, write all BAR1 8 KiB read 4 KiB ROM 4 KiB no "+
		"INTERRUPT VECTORS MASKABLE ENABLED MSI 4 yes all at once INTx 1 no one by one")
}

// Why a group is what it is is said of groups of any size, and long lists are cut.
func TestWhyTexts(t *testing.T) {
	group := func(n int) *iommu.Group {
		g := &iommu.Group{ID: 7}
		for i := range n {
			a := iommu.Address{Bus: 1, Device: uint8(i)}
			g.Devices = append(g.Devices, iommu.Device{Address: a, Name: a.String(), PCI: true, Driver: "drv"})
		}
		return g
	}
	one := &iommu.Device{Name: "0000:01:00.0", PCI: true}
	for want, w := range map[string]*why{
		"0000:01:00.0 is in no IOMMU group.":                      {device: one},
		"0000:01:00.0 is alone in IOMMU group 7.":                 {device: one, group: group(1)},
		"IOMMU group 7 has 2 devices.":                            {group: group(2)},
		"0000:01:00.0 shares IOMMU group 7 with 1 other device.":  {device: one, group: group(2)},
		"0000:01:00.0 shares IOMMU group 7 with 2 other devices.": {device: one, group: group(3)},
	} {
		wants(t, "head", w.head(), want)
	}
	members := []iommu.Address{{Bus: 1}, {Bus: 1, Device: 1}}
	for want, w := range map[string]*why{
		"x": {none: "x"},
		"It is no PCI device, and has no config space to tell why.": {},
		"No IOMMU is in front of it.": {device: one,
			computed: iommu.Computed{Known: true}},
		"By config space it would be in one with 0000:01:01.0.": {device: one,
			computed: iommu.Computed{Known: true, Members: members}},
		"By config space it would be in one with nothing else.": {device: one,
			computed: iommu.Computed{Known: true, Members: members[:1]}},
		"Config space says the same.": {device: one,
			group: group(2), computed: iommu.Computed{Known: true, Members: members}},
		"Config space says something else: 0000:01:00.0, 0000:01:01.0 would be one group.": {device: one,
			group: group(1), computed: iommu.Computed{Known: true, Members: members}},
	} {
		wants(t, "verdict", w.verdict(), want)
	}
	w := &why{device: one, computed: iommu.Computed{Missing: []string{"x was not read", "nor was y"}}}
	wants(t, "unknown", w.verdict(), "Whether config space says the same is not known: x was not read; nor was y.")

	for line, want := range map[string]string{"quiet": "these are not in one group with it: 0000:01:01.0.",
		"pcie_acs_override=downstream": "claim more isolation"} {
		h := &iommu.Host{Host: hosttest.Tree{"proc/cmdline": line + "\n"}.Host(t)}
		w := &why{device: one, group: group(2), computed: iommu.Computed{Known: true, Members: members[:1]}}
		if got := strings.Join(w.differences(h), " "); !strings.Contains(got, want) ||
			strings.Contains(got, "override") == (line == "quiet") {
			t.Errorf("%s: %q", line, got)
		}
		w.computed.Members = members
		if got := w.differences(h); got != nil {
			t.Errorf("%s: the same: %q", line, got)
		}
	}

	for n, want := range map[int]string{0: "", 6: "0 1 2 3 4 5", 7: "0 1 2 3 4 5 6",
		8: "0 1 2 3 4 5 ... and 2 more reasons of this kind (--json has them all)"} {
		w := &why{}
		for i := range n {
			// One of each two is said twice.
			w.edges = append(w.edges, slices.Repeat([]iommu.Edge{{Kind: iommu.EdgeAlias, Reason: strconv.Itoa(i)}},
				1+i%2)...)
		}
		wants(t, fmt.Sprint(n, " pairs"),
			said(func(out *bytes.Buffer) { writeReasons(out, &iommu.Topology{}, nil, w) }), want)
	}
	for n, want := range map[int]int{1: 0, 2: 1, 9: 8, 10: 9, 12: 9} {
		w := &why{device: one, group: group(n)}
		got := w.losses()
		if len(got) != want || n == 12 && got[8] != "and 3 more devices (viaduct show group=7)." {
			t.Errorf("losses of %d: %q", n, got)
		}
	}
	w = &why{group: group(6)}
	for n := range 5 {
		w.edges = append(w.edges, iommu.Edge{Kind: iommu.EdgePath, From: members[0],
			To: &w.group.Devices[n].Address, Hint: "c"})
	}
	wants(t, "cures", strings.Join(w.hints(), "|"), "0000:01:00.0, 0000:01:01.0, 0000:01:02.0, 2 others: c.")
	w.group = group(1)
	wants(t, "nothing to cure", strings.Join(w.hints(), "|"),
		"nothing has to: the others are ports, which stay as they are, and only 0000:01:00.0 is taken.")
	wants(t, "cut", cut(strings.Repeat("é", columns)), strings.Repeat("é", columns))
	wants(t, "cut", cut(strings.Repeat("é", columns+1)), strings.Repeat("é", columns-3)+"...")
}

// What a move took is told as far as it is known.
func TestOutcomeTexts(t *testing.T) {
	now := time.Unix(1000, 0)
	r := &migrate.Record{Guest: "web", Peer: "there"}
	clock := migrate.Clock{Ahead: time.Second, Error: 500 * time.Microsecond, Known: true}
	for want, o := range map[string]*migrate.Outcome{
		"web is here, as it was\n": {},
		"web is on there\n":        {Moved: true, Stopped: now, Resumed: now},
		"web is on there\nQEMU's downtime 5 ms\nstopped until it went on 20.0 ms (the clocks are known to 0.5 ms)\nwithout its VF 30.0 ms\n": {
			Moved: true, Downtime: new(5), Clock: clock, Stopped: now,
			Resumed: now.Add(time.Second + 20*time.Millisecond),
			Unplug:  now, Plugged: now.Add(time.Second + 30*time.Millisecond),
		},
	} {
		var out bytes.Buffer
		(&env{stdout: &out}).tellOutcome(r, o)
		wants(t, "outcome", out.String(), want)
		out.Reset()
		asJSON := &env{stdout: &out, json: true}
		if asJSON.tellOutcome(r, o); asJSON.unprinted != nil {
			t.Fatal(asJSON.unprinted)
		}
		if known := strings.Contains(out.String(), `"clock_error_ms": 0.5`); known != o.Clock.Known || !o.Clock.Known &&
			!strings.Contains(out.String(), `"stop_to_resume_ms": null`) {
			t.Errorf("in JSON: %s", out.String())
		}
	}
	for line, want := range map[string]string{"": "", "viaduct migrate --peer --data 17": "17", "viaduct --data": ""} {
		wants(t, line, dataAsked(line), want)
	}
}

// A firmware's table and an IOMMU that has it say what is known of them.
func TestIOMMUTexts(t *testing.T) {
	broken := errors.New("cut")
	for want, f := range map[string]*iommu.Firmware{
		"not known: reading it takes root": {Err: fs.ErrPermission},
		"not known: cut":                   {Err: broken},
		"revision 2, 48 bytes: 2 IVHD, 1 of unknown type 0x7": {Table: &acpi.Table{Header: acpi.Header{Revision: 2,
			Length: 48}, Blocks: []acpi.Block{{Name: "IVHD"}, {Type: 7}, {Name: "IVHD"}}}},
		"revision 2, 48 bytes: 1 IVHD; NOT SOUND: cut": {Table: &acpi.Table{Header: acpi.Header{Revision: 2,
			Length: 48}, Blocks: []acpi.Block{{Name: "IVHD"}}}, Err: broken},
	} {
		wants(t, "table", tableText(f), want)
	}

	names := strings.Fields("a b c d e f g h i j")
	wants(t, "none", some(nil), "none")
	wants(t, "eight", some(names[:8]), "a b c d e f g h")
	wants(t, "ten", some(names), "a b c d e f g h and 2 more")
	for want, u := range map[string]*iommu.UnitDetails{
		"":                          {},
		"it would cover a b":        {Described: names[:2]},
		"the table has c too":       {Active: true, Devices: names[:2], Described: names[:3]},
		"the table does not name b": {Active: true, Devices: names[:2], Described: names[:1]},
	} {
		wants(t, "differences", differences(u), want)
	}

	u := &iommu.UnitDetails{
		Base: 0x1000, Table: "DMAR", Block: 0x30,
		Ranges: []iommu.Direct{
			{Region: iommu.Region{Start: 1, End: 2, Type: "direct"}, Kind: "RMRR",
				Devices: []iommu.DirectDevice{{Name: "a"}}},
			{Region: iommu.Region{Start: 3, End: 4, Type: "direct-relaxable"}, Kind: "IVMD",
				Devices: []iommu.DirectDevice{{Name: "b"}}},
		},
	}

	u.Kind = "vt-d"
	wants(t, "unit", said(func(out *bytes.Buffer) { printUnit(out, u) }),
		"unit not in use: vt-d at 0x1000, DMAR at 0x30 "+
			"direct 0x1 - 0x2 for a: RMRR, so no guest can have them direct 0x3 - 0x4 for b: IVMD, until their driver has them")
	if v := unitReportOf(u); len(v.Ranges) != 2 || v.Ranges[0].Devices[0] != "a" || v.Ranges[1].Kind != "IVMD" ||
		*v.Block != 0x30 {
		t.Errorf("in JSON: %+v", v)
	}
	if w, direct := directWarning([]regionView{{Type: "msi"}, {Start: "1", End: "2", Type: "direct"}}); !direct ||
		w.Hint == nil || !strings.Contains(w.What, "(1 - 2, direct)") {
		t.Errorf("%+v, %v", w, direct)
	}
	if w, direct := directWarning([]regionView{{Type: "direct-relaxable"}}); direct {
		t.Errorf("%+v", w)
	}
}

// A VMM that is not root's is told of /dev/iommu where it may not open it, and reasons stand with their cures.
func TestMoreIsNeeded(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	h := &iommu.Host{Host: k.Host()}
	put(t, k, "dev/iommu", "")
	for _, c := range []struct {
		owner  string
		format *vmm.Format
		want   bool
	}{{"1000", &vmm.Format{IOMMUFD: true}, true}, {"", &vmm.Format{IOMMUFD: true}, false},
		{"1000", &vmm.Format{}, false}, {"1000", nil, false}} {
		if got := needsMore(h, c.format, c.owner); (got != "") != c.want || c.want &&
			!strings.Contains(got, "the VMM of 1000 needs it") {
			t.Errorf("%+v: %q", c, got)
		}
	}

	refused := holder.Because("x", holder.Reason{Text: "one"}, "cure it")
	wants(t, "reasons", strings.Join(reasonsOf(errors.Join(refused, refused)), "|"), "one (cure it)")
	wants(t, "none", strings.Join(reasonsOf(errors.New("a\nb")), "|"), "a|b")
}
