package hosttest

import (
	"encoding/binary"
	"encoding/hex"
	"strings"
)

// ACPITables are firmware tables about IOMMUs that have every kind of block and entry there is, by signature.
func ACPITables() map[string][]byte {
	ivhd := "0200 4000 0000f0fd00000000 0000 1301"                 // after type, flags and length
	entries := "01000000" + "021000d7" + "03180000" + "04ff0040" + // all, select, a range
		"4000000000000000" + "4200010000a50000" + "4300ff0000a50000" + "04ffff00" + // pad, aliases
		"4610000000000080" + "4711000000000010" + "04120000" + // extended
		"480000d721a00001" + "4800000000a00002" // IO-APIC, HPET

	named := "f0a50040" + asciiHex("AMDI0020") + "0000000000000000" + "0209" + asciiHex(`\_SB.FUR0`) +
		"f0a60000" + "d041000000000000" + asciiHex("PNP0C02\x00") + "0100" +
		"f0a70000" + asciiHex("MSFT0201") + "0000000000000000" + "0108" + "0102000000000000" +
		"f0a80000" + asciiHex("AMDI0095") + "0000000000000000" + "0000"

	return map[string][]byte{
		"IVRS": ACPITable("IVRS", 2, "43302000 0000000000000000",
			IVRSBlock("10 b0", ivhd+"6f8f0480"+entries),
			IVRSBlock("11 30", ivhd+"00020400 fa4a25a2ef776524 1000000000000000"+entries),
			IVRSBlock("20 01", "0000 0000 0000 000000000000 0000907d00000000 0000100000000000"),
			IVRSBlock("21 07", "6000 0000 0000 000000000000 0000907d00000000 0000100000000000"),
			IVRSBlock("22 08", "0001 ff01 0000 000000000000 0000007600000000 0000020000000000"),
			IVRSBlock("40 30", ivhd+"01020400 fa4a25a2ef776584 2009000000000000"+entries+named),
		),
		"DMAR": ACPITable("DMAR", 1, "2605 00000000000000000000",
			DMARBlock(0, "00 01 0000 0000d9fe00000000 0108000000000200"),
			DMARBlock(0, "01 00 0000 0010d9fe00000000 03080000 02f01f00 040800000000 1f00 05080000 0100 1500"),
			DMARBlock(1, "0000 0000 00706c6e00000000 ff6f6e6e00000000 0108000000001400 020a00000000 1c04 0001"),
			DMARBlock(2, "01 00 0100"),
			DMARBlock(2, "00 00 0000 0208000000000100"),
			DMARBlock(3, "00000000 0010d9fe00000000 01000000"),
			DMARBlock(4, "000000 01"+asciiHex(`\_SB.PCI0.I2C0`+"\x00\x00")),
			DMARBlock(5, "01 00 0000 0108000000000300"),
			DMARBlock(6, "0000 0000 0108020000000400"),
		),
		"IORT": iort(),
		"VIOT": ACPITable("VIOT", 0, "0400 3000 0000000000000000",
			Bytes("01 00 1800 00010000 0000 0000 0000 ffff 6000 000000000000"),
			Bytes("02 00 1800 01000000 00000b0c00000000 7000 000000000000"),
			Bytes("03 00 1000 0000 1000 0000000000000000"),
			Bytes("04 00 1000 00000000 0000000a00000000"),
		),
	}
}

// iort is a table with a node of each type.
func iort() []byte {
	mapping := "00000000 ffff0000 00000000 30000000 01000000"
	memory := "01000000 0f 0000 03"
	return ACPITable("IORT", 3, "07000000 30000000 00000000",
		IORTNode(0, 1, 0, "02000000 00000000 01000000", "", 0),
		IORTNode(4, 4, 1, "0000050900000000 1f000000 00000000 0000000000000000 00000000 6a000000 6b000000 6d000000 "+
			"6c000000 01000000 00000000", mapping, 1),
		IORTNode(3, 3, 2, "0000000b00000000 0000010000000000 03000000 03000000 3c000000 01000000 4c000000 01000000 "+
			"54000000 20000000 01000000 21000000 00000000 2200000001000000 2300000000000000", mapping, 1),
		IORTNode(2, 4, 3, memory+"07000000 00000000 30 1000 00", mapping+mapping, 2),
		IORTNode(1, 4, 4, "0b000000"+memory+"28"+asciiHex(`\_SB.NIC0`+"\x00\x00"), mapping, 1),
		IORTNode(5, 2, 5, "0000000c00000000 44000000 4c000000 0000010c00000000", mapping, 1),
		IORTNode(6, 3, 6, "17000000 02000000 1c000000 0000008000000000 0000100000000000 00000000 "+
			"0000009000000000 0000200000000000 00000000", mapping, 1),
	)
}

// Bytes is the bytes that hexadecimal digits with blanks between them stand for.
func Bytes(digits string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

func asciiHex(s string) string { return hex.EncodeToString([]byte(s)) }

// ACPITable is a table with its length and sum right; fixed is what follows the header, as hexadecimal digits.
func ACPITable(signature string, revision uint8, fixed string, blocks ...[]byte) []byte {
	b := append([]byte(signature), 0, 0, 0, 0, revision, 0)
	b = append(b, "MADEUPVIADUCT \x01\x00\x00\x00TEST\x01\x00\x00\x00"...)
	b = append(b, Bytes(fixed)...)
	for _, block := range blocks {
		b = append(b, block...)
	}
	return SoundACPI(b)
}

// SoundACPI puts the right length and sum into a table.
func SoundACPI(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[4:], uint32(len(b)))
	b[9] = 0
	sum := byte(0)
	for _, v := range b {
		sum += v
	}
	b[9] = -sum
	return b
}

// IVRSBlock is type and flags, the length, and the rest.
func IVRSBlock(head, rest string) []byte {
	b := append(append(Bytes(head), 0, 0), Bytes(rest)...)
	binary.LittleEndian.PutUint16(b[2:], uint16(len(b)))
	return b
}

// DMARBlock is the type, the length, and the rest.
func DMARBlock(kind uint16, rest string) []byte {
	b := append(make([]byte, 4), Bytes(rest)...)
	binary.LittleEndian.PutUint16(b, kind)
	binary.LittleEndian.PutUint16(b[2:], uint16(len(b)))
	return b
}

// IORTNode is a node of an IORT, with its mappings at the end.
func IORTNode(kind, revision uint8, id uint32, data, mappings string, count uint32) []byte {
	b := append([]byte{kind, 0, 0, revision}, make([]byte, 12)...)
	b = append(b, Bytes(data)...)
	binary.LittleEndian.PutUint32(b[4:], id)
	binary.LittleEndian.PutUint32(b[8:], count)
	if count > 0 {
		binary.LittleEndian.PutUint32(b[12:], uint32(len(b)))
	}
	b = append(b, Bytes(mappings)...)
	binary.LittleEndian.PutUint16(b[1:], uint16(len(b)))
	return b
}
