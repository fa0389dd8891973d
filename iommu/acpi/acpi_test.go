package acpi

import (
	"encoding/json"
	"errors"
	"maps"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// What stands in tables with every kind of block and entry is found, in the order and at the places where it stands.
func TestParse(t *testing.T) {
	for signature, want := range map[string]string{
		"IVRS": "10@30+68(13) 11@98+78(13) 20@110+20(0) 21@130+20(0) 22@150+20(0) 40@170+e1(17)",
		"DMAR": "0@30+18(1) 0@48+28(3) 1@70+2a(2) 2@9a+8(0) 2@a2+10(1) 3@b2+14(0) 4@c6+18(0) 5@de+10(1) 6@ee+10(1)",
		"IORT": "0@30+1c(0) 4@4c+58(1) 3@a4+70(1) 2@114+4c(2) 1@160+3c(1) 5@19c+3c(1) 6@1d8+58(3)",
		"VIOT": "1@30+18(0) 2@48+18(0) 3@60+10(0) 4@70+10(0)",
	} {
		table, err := Parse(hosttest.ACPITables()[signature])
		if err != nil {
			t.Fatalf("%s: %v", signature, err)
		}

		var got []string
		for _, b := range table.Blocks {
			got = append(got, fmtBlock(signature, b))
			if b.Name == "" || b.Fields == nil {
				t.Errorf("%s: the block at %#x was not understood", signature, b.Offset)
			}
			end := b.Offset
			for _, e := range b.Entries {
				if e.Name == "" || e.Fields == nil || e.Offset < end || e.Offset+e.Length > b.Offset+b.Length {
					t.Errorf("%s: entry %+v of the block at %#x", signature, e, b.Offset)
				}
				if signature != "IORT" {
					end = e.Offset + e.Length
				}
			}
		}

		if text := strings.Join(got, " "); text != want {
			t.Errorf("%s:\n%s\nwant\n%s", signature, text, want)
		}
	}
}

func fmtBlock(signature string, b Block) string {
	kind := Hex(b.Type).String()[2:]
	return kind + "@" + Hex(b.Offset).String()[2:] + "+" + Hex(b.Length).String()[2:] + "(" +
		Hex(len(b.Entries)).dec() + ")"
}

func (h Hex) dec() string { b, _ := json.Marshal(uint64(h)); return string(b) }

// The fields whose meaning the table itself gives them are understood.
func TestFields(t *testing.T) {
	ivrs, _ := Parse(hosttest.ACPITables()["IVRS"])
	head := ivrs.Fields.(*IVRS)
	if !head.Info.EFRValid() || !head.Info.PreBootDMA() || head.Info.PhysicalBits() != 48 || head.Info.VirtualBits() != 64 {
		t.Errorf("IVinfo: %v", head.Info.Names())
	}
	h := ivrs.Blocks[5].Fields.(*IVHD)
	if h.DeviceID.String() != "00:00.2" || h.MSINumber() != 0x13 || h.UnitID() != 1 || !h.Attributes.HostTablesDisabled() {
		t.Errorf("IVHD: %+v", h)
	}
	e := h.EFR
	if e.X2APIC() || !e.AVIC() || !e.GuestAPIC() || e.DirtyTracking() || !e.SNP() || !e.PageRequests() || !e.Plausible() ||
		e.HostLevels() != 6 || e.GuestLevels() != 4 || e.PASIDBits() != 16 {
		t.Errorf("EFR: %v", e.Names())
	}
	if !h.EFR2.HTRangeFree() || h.EFR2.RemapEntries() != 2048 {
		t.Errorf("EFR2: %v", h.EFR2.Names())
	}
	var named []string
	for _, e := range ivrs.Blocks[5].Entries {
		if d, ok := e.Fields.(*HIDEntry); ok {
			named = append(named, d.HID+" "+d.UID)
		}
	}
	if want := []string{`AMDI0020 \_SB.FUR0`, "0x41d0 ", "MSFT0201 0x201", "AMDI0095 "}; !slices.Equal(named, want) {
		t.Errorf("named devices: %q, want %q", named, want)
	}
	for i, want := range map[int][4]bool{
		2: {true, true, true, true}, 3: {false, true, false, false}, 4: {false, false, true, false},
	} {
		m := ivrs.Blocks[i].Fields.(*IVMD)
		kind := ivrs.Blocks[i].Type
		got := [4]bool{m.Covers(kind, 0, 0x50), m.Covers(kind, 0, 0x60), m.Covers(kind, 0, 0x1ff), m.Covers(kind, 0, 0x200)}
		if got != want || m.Covers(kind, 1, 0x60) || m.Flags.Exclusion() == m.Flags.Unity() {
			t.Errorf("IVMD %02xh: %+v: %v", kind, m, got)
		}
	}

	dmar, _ := Parse(hosttest.ACPITables()["DMAR"])
	if d := dmar.Fields.(*DMAR); d.AddressBits() != 39 || !d.Flags.InterruptRemapping() || d.Flags.X2APICOptOut() || !d.Flags.PlatformOptIn() {
		t.Errorf("DMAR: %+v", d)
	}
	scope := dmar.Blocks[2].Entries[1].Fields.(*Scope)
	if want := []Step{{0x1c, 4}, {0, 1}}; !reflect.DeepEqual(scope.Path, want) {
		t.Errorf("the path of a scope: %v", scope.Path)
	}
	iort, _ := Parse(hosttest.ACPITables()["IORT"])
	smmu := iort.Blocks[2].Fields.(*SMMU)
	if smmu.GlobalInterrupts == nil || len(smmu.ContextInterrupts) != 1 || len(smmu.PMUInterrupts) != 1 {
		t.Errorf("SMMU: %+v", smmu)
	}
}

// A VT-d unit's registers say how wide its addresses are, and what it can do.
func TestVTd(t *testing.T) {
	for c, want := range map[VTdCap]int{
		0x2f0200: 39, 0x2f0400: 48, 0x2f0600: 48, 0x260600: 39, 0x380e00: 57, 0x380400: 48, 0x2f0000: 48,
	} {
		if got := c.GuestBits(); got != want {
			t.Errorf("cap %x: %d bits, want %d", uint64(c), got, want)
		}
	}
	c, e := VTdCap(1<<59|1<<60|1<<7|2), VTdECap(1<<2|1<<3|1<<4|1<<7|1<<26|1<<29|19<<35|1<<40|1<<43|1<<45|1<<48)
	if !c.PostedInterrupts() || !c.FiveLevels() || !c.Emulated() || c.Domains() != 256 {
		t.Errorf("cap: %v", c.Names())
	}
	if !e.InterruptRemapping() || !e.X2APIC() || !e.DirtyTracking() || !e.DeviceTLB() || !e.PageRequests() ||
		!e.Nested() || !e.SnoopControl() || e.PASIDBits() != 20 {
		t.Errorf("ecap: %v", e.Names())
	}
	if e &^= 1 << 48; e.DirtyTracking() {
		t.Error("it tracks without a coherent walk of tables")
	}
}

// A fault is told, and what stands before it is there all the same.
func TestFaults(t *testing.T) {
	change := func(signature string, f func(b []byte) []byte) []byte {
		return f(slices.Clone(hosttest.ACPITables()[signature]))
	}

	for name, c := range map[string]struct {
		table  []byte
		error  string
		blocks int
	}{
		"nothing":       {nil, "0 bytes", 0},
		"another":       {change("DMAR", func(b []byte) []byte { copy(b, "FACP"); return b }), `"FACP"`, 0},
		"sum":           {change("DMAR", func(b []byte) []byte { b[9]++; return b }), "add up to 0x01", 9},
		"cut":           {change("IVRS", func(b []byte) []byte { return b[:len(b)-1] }), "is said to have", 0},
		"length 0":      {change("DMAR", func(b []byte) []byte { b[0x4a], b[0x4b] = 0, 0; return hosttest.SoundACPI(b) }), "offset 0x48 is said to have 0 bytes", 1},
		"past the end":  {change("IVRS", func(b []byte) []byte { b[0x173] = 9; return hosttest.SoundACPI(b) }), "offset 0x170", 5},
		"unknown entry": {change("IVRS", func(b []byte) []byte { b[0x48] = 0xc1; return hosttest.SoundACPI(b) }), "type c1h", 1},
		"cut entry":     {change("IVRS", func(b []byte) []byte { b[0xa8] = 0x46; b[0xa4] = 0x03; return hosttest.SoundACPI(b) }), "", 6},
		"few nodes":     {change("VIOT", func(b []byte) []byte { b[36] = 5; return hosttest.SoundACPI(b) }), "too few for another", 4},
		"more nodes":    {change("VIOT", func(b []byte) []byte { b[36] = 1; return hosttest.SoundACPI(b) }), "", 1},
		"mappings":      {change("IORT", func(b []byte) []byte { b[0x4c+8] = 99; return hosttest.SoundACPI(b) }), "99 items of 20 bytes", 1},
	} {
		table, err := Parse(c.table)
		if (err == nil) != (c.error == "") ||
			err != nil && (!errors.Is(err, ErrTable) || !strings.Contains(err.Error(), c.error)) {
			t.Errorf("%s: %v, want %q", name, err, c.error)
		}
		if table != nil && len(table.Blocks) != c.blocks || table == nil && c.blocks > 0 {
			t.Errorf("%s: %+v, want %d blocks", name, table, c.blocks)
		}
	}
}

// Cut anywhere, or with any byte changed, with the sum right or not, a table gives an error or a value.
func TestDamage(t *testing.T) {
	tables := realTables(t)
	maps.Copy(tables, hosttest.ACPITables())
	for name, b := range tables {
		for n := range b {
			// Which takes long.
			asJSON := n%8 == 0
			if table, err := Parse(b[:n]); err == nil {
				t.Errorf("%s cut to %d bytes: %+v", name, n, table)
			}
			if n >= fixedLength {
				check(t, hosttest.SoundACPI(slices.Clone(b[:n])), asJSON)
			}
			values := []byte{0, 1, b[n] + 1, b[n] ^ 0x80, 0x7f, 0xff}
			if strings.Contains(name, "/") {
				// There are many real ones, which are much alike.
				values = values[n%len(values):][:1]
			}
			for _, v := range values {
				changed := slices.Clone(b)
				changed[n] = v
				check(t, changed, asJSON)
				if n != 9 && (n < 4 || n >= 8) {
					check(t, hosttest.SoundACPI(changed), asJSON)
				}
			}
		}
	}
}

// check parses a table and gives it as JSON: neither may fail but as they say.
func check(t *testing.T, b []byte, asJSON bool) {
	t.Helper()
	table, err := Parse(b)
	if err != nil && !errors.Is(err, ErrTable) {
		t.Fatalf("%x: %v", b, err)
	}
	if table == nil {
		return
	}
	for _, block := range table.Blocks {
		if block.Offset < fixedLength || block.Offset+block.Length > len(b) || block.Length <= 0 {
			t.Fatalf("%x: block %+v", b, block)
		}
	}
	if !asJSON {
		return
	}
	if out, err := json.Marshal(table); err != nil || !json.Valid(out) {
		t.Fatalf("%x: %v", b, err)
	}
}

// Whatever is in a table, decoding takes memory in proportion to its length.
func TestMemory(t *testing.T) {
	for name, b := range hosttest.ACPITables() {
		// The most entries for their length: nodes of four-byte entries, and of many blocks.
		for len(b) < 1<<16 {
			b = append(b, b[fixedLength:]...)
		}
		if name == "IORT" || name == "VIOT" {
			b[36], b[37] = 0xff, 0xff
		}
		b = hosttest.SoundACPI(b)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _ = Parse(b)
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > 100*uint64(len(b)) {
			t.Errorf("%s of %d bytes takes %d bytes", name, len(b), used)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, b := range hosttest.ACPITables() {
		f.Add(b, false)
	}
	f.Fuzz(func(t *testing.T, b []byte, wrong bool) {
		if !wrong && len(b) >= fixedLength {
			b = hosttest.SoundACPI(slices.Clone(b))
		}
		check(t, b, true)
	})
}

// What a block's type has is in JSON also where it is 0, and what it has not is never there.
func TestIVHDZeros(t *testing.T) {
	const head = "0200 4000 0000f0fd00000000 0000 0000 00000000"
	table, err := Parse(hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000",
		hosttest.IVRSBlock("10 00", head+"01000000"), hosttest.IVRSBlock("11 00", head+"0000000000000000 0000000000000000 01000000")))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []map[string]bool{
		{"features": true, "attributes": false, "efr": false, "efr2": false},
		{"features": false, "attributes": true, "efr": true, "efr2": true},
	} {
		b, err := json.Marshal(table.Blocks[i])
		if err != nil {
			t.Fatal(err)
		}
		for name, there := range want {
			if strings.Contains(string(b), `"`+name+`":{"raw"`) != there {
				t.Errorf("type %xh: %s is there: %v; %s", table.Blocks[i].Type, name, !there, b)
			}
		}
	}
}
