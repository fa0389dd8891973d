// Package acpi decodes the tables by which firmware describes a host's IOMMUs: IVRS (AMD), DMAR (Intel), IORT (Arm) and
// VIOT (virtio), and the registers that tell what these can do. It takes bytes and gives values, and reads nothing by
// itself. Whatever the bytes are, it neither
// panics nor needs more memory than a small multiple of them.
package acpi

import (
	"errors"
	"fmt"
)

// ErrTable is matched by every error about the content of a table.
var ErrTable = errors.New("not a sound ACPI table")

// ErrSum is matched, beside ErrTable, where a table is sound but for its bytes' sum. Linux refuses such an IVRS
// (drivers/iommu/amd/init.c, check_ivrs_checksum); of others it only warns (ACPI_CHECKSUM_ABORT is not set).
var ErrSum = fmt.Errorf("%w: wrong checksum", ErrTable)

func bad(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrTable, fmt.Sprintf(format, a...))
}

// Signatures are those of the tables that [Parse] knows, as the kernel names their files in /sys/firmware/acpi/tables.
var Signatures = []string{"IVRS", "DMAR", "IORT", "VIOT"}

// Table is a decoded table. It keeps no part of the bytes it was decoded from.
type Table struct {
	Header
	Fields any     // *IVRS, *DMAR, *IORT or *VIOT: what stands once, before the blocks
	Blocks []Block // in the table's order
}

// Header is what begins each table (ACPI 6.5, 5.2.6).
type Header struct {
	Signature       string // four characters
	Length          uint32 // of the whole table, in bytes
	Revision        uint8
	Checksum        uint8
	OEMID           string
	OEMTableID      string
	OEMRevision     uint32
	CreatorID       string
	CreatorRevision uint32
}

// Block is one of the structures that a table is a list of.
type Block struct {
	Type   int    // as in the table's specification
	Name   string // as there, e.g. IVHD; "" if the type is not known
	Offset int    // in the table
	Length int    // in bytes, entries included
	// Fields is what the block says by itself, a pointer to the type of that name, e.g. *IVHD; nil if the type is not
	// known.
	Fields  any
	Entries []Entry // in the block's order
}

// Entry is a part of a block of which it may have many: a device entry, device scope, id mapping or memory range.
type Entry struct {
	// Type is as in the table's specification, and below zero where that has no number for it: in IORT.
	Type   int
	Name   string // "" if the type is not known
	Offset int    // in the table
	Length int    // in bytes
	Fields any    // nil if the type is not known
}

// headerLength is the length of the header that all tables have.
const headerLength = 36

// fixedLength is the length of the fixed part of each of these tables, with the header.
const fixedLength = 48

// forms are how these tables are read: the rest of the fixed part, and the blocks.
var forms = map[string]struct {
	fields func(r *reader) any
	blocks func(t *Table, table []byte) error
}{
	"IVRS": {readIVRS, ivrsBlocks}, "DMAR": {readDMAR, dmarBlocks},
	"IORT": {readIORT, iortBlocks}, "VIOT": {readVIOT, viotBlocks},
}

// Parse decodes a table. Its error matches [ErrTable], and comes with what was decoded up to the fault, for those who
// want to show it: nil if that is nothing. A table whose sum is wrong is decoded to its end all the same, and its error
// matches [ErrSum].
func Parse(table []byte) (*Table, error) {
	if len(table) < headerLength {
		return nil, bad("%d bytes; its header alone has %d", len(table), headerLength)
	}
	r := reader{b: table}
	t := &Table{Header: Header{
		Signature:       r.text(4),
		Length:          r.u32(),
		Revision:        r.u8(),
		Checksum:        r.u8(),
		OEMID:           r.text(6),
		OEMTableID:      r.text(8),
		OEMRevision:     r.u32(),
		CreatorID:       r.text(4),
		CreatorRevision: r.u32(),
	}}
	f, known := forms[t.Signature]
	switch {
	case !known:
		return nil, bad("%q is not one of the tables about IOMMUs", t.Signature)
	case uint64(t.Length) != uint64(len(table)):
		return t, bad("%s is said to have %d bytes, and has %d", t.Signature, t.Length, len(table))
	case len(table) < fixedLength:
		return t, bad("%s has %d bytes, of at least %d", t.Signature, len(table), fixedLength)
	}

	t.Fields = f.fields(&r)
	err := f.blocks(t, table)
	if sum := sum(table); err == nil && sum != 0 {
		err = fmt.Errorf("%w: the bytes of %s add up to %#02x instead of 0", ErrSum, t.Signature, sum)
	}
	return t, err
}

func sum(b []byte) (sum uint8) {
	for _, v := range b {
		sum += v
	}
	return sum
}

// split cuts the bytes of a table from an offset on into blocks, each of which tells its length, and calls add for
// each: b is the block. Head is the least that a block has; the length is that which lengthOf finds in it.
func split(table []byte, from, head int, lengthOf func(b []byte) int, add func(offset int, b []byte) error) error {
	for at := from; at < len(table); {
		length, err := next(table, at, head, lengthOf)
		if err != nil {
			return err
		}
		if err := add(at, table[at:at+length]); err != nil {
			return err
		}
		at += length
	}
	return nil
}

// counted is split for so many blocks; what follows them is padding.
func counted(table []byte, from, head int, count uint64, lengthOf func(b []byte) int,
	add func(offset int, b []byte) error) error {
	for at := from; count > 0; count-- {
		length, err := next(table, at, head, lengthOf)
		if err != nil {
			return err
		}
		if err := add(at, table[at:at+length]); err != nil {
			return err
		}
		at += length
	}
	return nil
}

// next is the length of the block at an offset, which is within the table.
func next(table []byte, at, head int, lengthOf func(b []byte) int) (int, error) {
	rest := table[at:]
	if len(rest) < head {
		return 0, bad("%d bytes at offset %#x are too few for another block", len(rest), at)
	}
	length := lengthOf(rest)
	if length < head || length > len(rest) {
		return 0, bad("the block at offset %#x is said to have %d bytes, of %d that are left", at, length, len(rest))
	}
	return length, nil
}

// short says that a block or an entry ends before its fields do.
func short(what string, offset, length, least int) error {
	return bad("%s at offset %#x has %d bytes, of at least %d", what, offset, length, least)
}
