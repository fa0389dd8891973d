package acpi

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// reader takes little-endian fields from the front of bytes. Past their end it gives zeros: who uses it has checked the
// length.
type reader struct {
	b  []byte
	at int
}

func (r *reader) take(n int) []byte {
	from, to := min(r.at, len(r.b)), min(r.at+n, len(r.b))
	r.at += n
	return r.b[from:to]
}

// number reads an unsigned number of up to eight bytes.
func (r *reader) number(size int) uint64 {
	var b [8]byte
	copy(b[:], r.take(size))
	return binary.LittleEndian.Uint64(b[:])
}

func (r *reader) u8() uint8   { return uint8(r.number(1)) }
func (r *reader) u16() uint16 { return uint16(r.number(2)) }
func (r *reader) u32() uint32 { return uint32(r.number(4)) }
func (r *reader) u64() uint64 { return r.number(8) }
func (r *reader) hex() Hex    { return Hex(r.number(8)) }

// bytes copies the next n bytes.
func (r *reader) bytes(n int) Bytes { return bytes.Clone(r.take(n)) }

// text reads a name of n bytes at most, which ends before a zero.
func (r *reader) text(n int) string {
	b, _, _ := bytes.Cut(r.take(n), []byte{0})
	return string(b)
}

// rest is how many bytes are left.
func (r *reader) rest() int { return max(0, len(r.b)-r.at) }

// Hex is an address, a length or a register. As text it is "0xfee00000": a JSON number of that size would not survive
// every reader.
type Hex uint64

func (h Hex) String() string { return fmt.Sprintf("%#x", uint64(h)) }

// MarshalText gives the text of [Hex.String].
func (h Hex) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// Bytes are bytes that mean nothing by themselves. As text they are hexadecimal.
type Bytes []byte

// MarshalText gives two digits for each byte.
func (b Bytes) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%x", []byte(b)), nil }

// IsZero reports whether all bytes are zero, as reserved ones should be.
func (b Bytes) IsZero() bool { return len(bytes.Trim(b, "\x00")) == 0 }

// RequesterID is a PCI function within its segment: bus, device and function in 16 bits. As text it is "00:14.0".
type RequesterID uint16

func (id RequesterID) String() string {
	n := uint16(id)
	return fmt.Sprintf("%02x:%02x.%d", n>>8, n>>3&31, n&7)
}

// MarshalText gives the text of [RequesterID.String].
func (id RequesterID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }
