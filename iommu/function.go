package iommu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Function is what a PCI function's config space says of it. A field that is nil is a capability that the function has
// not got or, if the list that would have it is not whole, one that may only not have been read.
type Function struct {
	Vendor, Device uint16 // ffff in a VF's own
	Class          uint32 // 24 bits, as in [ID]
	Layout         int    // of the header: 0 of an endpoint, 1 of a PCI-to-PCI bridge, 2 of a CardBus bridge
	Multifunction  bool   // as the header says, which counts for function 0 alone
	Buses          *Buses // of a bridge

	Capabilities, Extended []Capability // in their order
	// Whole and ExtendedWhole report whether the two lists were read to their ends. The second list is also whole where
	// the kernel itself reaches only the first 256 bytes: what is there is then as good as absent.
	Whole, ExtendedWhole bool

	Express *Express
	Power   *Power
	AF      *AdvancedFeatures
	ACS     *ACS
	ARI     *ARI
	ATS     *ATS
	PRI     *PRI
	PASID   *PASID
	SRIOV   *SRIOVCapability
}

// Buses are the numbers of the buses that a bridge connects.
type Buses struct{ Primary, Secondary, Subordinate uint8 }

// PortType is what a function is to PCI Express (PCIe base specification 7.5.3.2, Device/Port Type).
type PortType uint8

// The types.
const (
	Endpoint           PortType = 0x0
	LegacyEndpoint     PortType = 0x1
	RootPort           PortType = 0x4
	UpstreamPort       PortType = 0x5
	DownstreamPort     PortType = 0x6
	PCIeToPCIBridge    PortType = 0x7
	PCIToPCIeBridge    PortType = 0x8
	IntegratedEndpoint PortType = 0x9
	EventCollector     PortType = 0xa
)

var portTypes = map[PortType]string{
	Endpoint: "endpoint", LegacyEndpoint: "legacy endpoint", RootPort: "root port", UpstreamPort: "upstream port",
	DownstreamPort: "downstream port", PCIeToPCIBridge: "PCIe-to-PCI bridge", PCIToPCIeBridge: "PCI-to-PCIe bridge",
	IntegratedEndpoint: "root complex integrated endpoint", EventCollector: "root complex event collector",
}

// String is the type in the specification's words.
func (p PortType) String() string {
	if s, ok := portTypes[p]; ok {
		return s
	}
	return fmt.Sprintf("type %#x", uint8(p))
}

// above reports whether a link begins below it.
func (p PortType) above() bool { return p == RootPort || p == DownstreamPort || p == PCIToPCIeBridge }

// Express is the PCI Express capability.
type Express struct {
	Type          PortType
	FunctionReset bool // FLR
	// ARIForwarding are of a port: whether it can forward to more than eight functions, and does.
	ARIForwarding, ARIForwards bool
}

// Power is the power management capability. SoftReset reports whether a return from D3hot resets the function.
type Power struct{ SoftReset bool }

// AdvancedFeatures is the capability of conventional PCI functions that can be reset alone.
type AdvancedFeatures struct{ FunctionReset bool }

// ACS is the Access Control Services capability.
type ACS struct {
	Capability, Control ACSFlags
	// Vector is what follows: the egress control vector, or the control register of those Intel ports that have dwords
	// where the specification has words.
	Vector uint32
}

// ACSFlags are access control services (PCIe base specification 7.7.11).
type ACSFlags uint16

// The services.
const (
	SourceValidation ACSFlags = 1 << iota
	TranslationBlocking
	RequestRedirect
	CompletionRedirect
	UpstreamForwarding
	EgressControl
	DirectTranslated
)

// String are the flags in the specification's letters.
func (f ACSFlags) String() string {
	var out []byte
	for i, name := range [...]string{"SV", "TB", "RR", "CR", "UF", "EC", "DT"} {
		if f&(1<<i) != 0 {
			out = append(append(out, ' '), name...)
		}
	}
	if out == nil {
		return "none"
	}
	return string(out[1:])
}

// ARI is the Alternative Routing-ID Interpretation capability.
type ARI struct {
	FunctionGroups, ACSGroups bool
	Next                      uint8 // the next function
}

// ATS is the Address Translation Service capability.
type ATS struct {
	QueueDepth int
	Enabled    bool
	SmallestTU uint8
}

// PRI is the Page Request Interface capability.
type PRI struct {
	Enabled, Stopped     bool
	Capacity, Allocation uint32
}

// PASID is the Process Address Space ID capability.
type PASID struct {
	Execute, Privileged bool
	Width               int // bits
	Enabled             bool
}

// SRIOVCapability is the capability of a PF.
type SRIOVCapability struct {
	Enabled, ARI        bool
	Initial, Total, VFs int
	Dependency          uint8
	Offset, Stride      int
	VFDevice            uint16
	PageSizes           uint32
}

// FLR reports whether the function has a reset of its own in its registers.
func (f *Function) FLR() bool {
	return f.Express != nil && f.Express.FunctionReset || f.AF != nil && f.AF.FunctionReset
}

// ReadFunction reads what a function's config space says of it. It wakes a sleeping device. Without CAP_SYS_ADMIN only
// the first 64 bytes are there, and the function's lists are not whole.
func ReadFunction(h *Host, a Address) (*Function, error) {
	f, err := h.File(configOf(a))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size := configEnd
	if h.Live() {
		// A captured one may have been cut.
		size = int(f.Size())
	}
	out, err := DecodeFunction(f, size)
	if err != nil {
		return nil, fmt.Errorf("config space of %s: %w", a, err)
	}
	return out, nil
}

// DecodeFunction decodes config space of which the kernel reaches the first size bytes. It reads no more of it than it
// needs.
func DecodeFunction(config io.ReaderAt, size int) (*Function, error) {
	var b [standardStart]byte
	if n, err := config.ReadAt(b[:], 0); n < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("%d bytes: %w", n, err)
	}
	if binary.LittleEndian.Uint32(b[8:]) == 0xffffffff {
		return nil, errors.New("the device does not answer (it reads as all ones)")
	}

	f := &Function{
		Vendor: binary.LittleEndian.Uint16(b[0:]), Device: binary.LittleEndian.Uint16(b[2:]),
		Class:  binary.LittleEndian.Uint32(b[8:]) >> 8,
		Layout: int(b[0x0e] & 0x7f), Multifunction: b[0x0e]&0x80 != 0,
	}
	pointer := 0x34
	switch f.Layout {
	case 1:
		f.Buses = &Buses{b[0x18], b[0x19], b[0x1a]}
	case 2:
		f.Buses = &Buses{b[0x18], b[0x19], b[0x1a]}
		pointer = 0x14
	}
	f.Whole = true
	if b[0x06]&0x10 != 0 {
		f.Capabilities, f.Whole = standardCapabilities(config, int(b[pointer]))
	}

	r := registers{config, true}
	f.standard(&r)
	f.Whole = f.Whole && r.whole
	f.ExtendedWhole = f.Whole
	if f.Express == nil || size <= extendedStart {
		return f, nil
	}
	f.Extended, f.ExtendedWhole = extendedCapabilities(config, allCapabilities)
	r = registers{config, true}
	f.extended(&r)
	f.ExtendedWhole = f.ExtendedWhole && r.whole && f.Whole
	return f, nil
}

// registers reads the registers of capabilities; whole says that none was missing.
type registers struct {
	config io.ReaderAt
	whole  bool
}

// of reads n dwords of a capability.
func (r *registers) of(at, n int) (d [8]uint32, ok bool) {
	if at == 0 {
		return d, false
	}
	for i := range n {
		if d[i], ok = dword(r.config, at+4*i); !ok {
			r.whole = false
			return d, false
		}
	}
	return d, true
}

// standard decodes the capabilities of the first list: PCIe base specification 7.5.2 (power management) and 7.5.3
// (PCI Express), and the ECN "Advanced Capabilities for Conventional PCI".
func (f *Function) standard(r *registers) {
	if d, ok := r.of(offsetOf(f.Capabilities, 0x01), 2); ok {
		f.Power = &Power{SoftReset: d[1]&(1<<3) == 0}
	}
	if d, ok := r.of(offsetOf(f.Capabilities, 0x13), 1); ok {
		f.AF = &AdvancedFeatures{FunctionReset: d[0]>>24&3 == 3}
	}
	at := offsetOf(f.Capabilities, 0x10)
	d, ok := r.of(at, 2)
	if !ok {
		return
	}
	f.Express = &Express{Type: PortType(d[0] >> 20 & 0xf), FunctionReset: d[1]&(1<<28) != 0}
	// Version 1 has no second set of registers.
	if version := d[0] >> 16 & 0xf; version >= 2 && (f.Express.Type == RootPort || f.Express.Type == DownstreamPort) {
		if d, ok := r.of(at+0x24, 2); ok {
			f.Express.ARIForwarding, f.Express.ARIForwards = d[0]&(1<<5) != 0, d[1]&(1<<5) != 0
		}
	}
}

// extended decodes the capabilities of the second list: PCIe base specification 7.7.11 (ACS), 7.8.8 (ARI), 7.8.9
// (PASID), 9.3.3 (SR-IOV), 10.5.1 (ATS), 10.5.2 (PRI).
func (f *Function) extended(r *registers) {
	at := func(id uint16) int { return offsetOf(f.Extended, id) }
	if d, ok := r.of(at(0x000d), 2); ok {
		f.ACS = &ACS{Capability: ACSFlags(d[1]), Control: ACSFlags(d[1] >> 16)}
		if after := at(0x000d) + 8; after < configEnd {
			d, _ := r.of(after, 1)
			f.ACS.Vector = d[0]
		}
	}

	if d, ok := r.of(at(0x000e), 2); ok {
		f.ARI = &ARI{d[1]&1 != 0, d[1]&2 != 0, uint8(d[1] >> 8)}
	}

	if d, ok := r.of(at(0x000f), 2); ok {
		depth := int(d[1] & 0x1f)
		if depth == 0 {
			depth = 32
		}
		f.ATS = &ATS{depth, d[1]&(1<<31) != 0, uint8(d[1] >> 16 & 0x1f)}
	}

	if d, ok := r.of(at(0x0010), 8); ok {
		f.SRIOV = &SRIOVCapability{
			Enabled: d[2]&1 != 0, ARI: d[2]&(1<<4) != 0,
			Initial: int(d[3] & 0xffff), Total: int(d[3] >> 16), VFs: int(d[4] & 0xffff), Dependency: uint8(d[4] >> 16),
			Offset: int(d[5] & 0xffff), Stride: int(d[5] >> 16), VFDevice: uint16(d[6] >> 16), PageSizes: d[7],
		}
	}

	if d, ok := r.of(at(0x0013), 4); ok {
		f.PRI = &PRI{d[1]&1 != 0, d[1]&(1<<24) != 0, d[2], d[3]}
	}
	if d, ok := r.of(at(0x001b), 2); ok {
		f.PASID = &PASID{d[1]&2 != 0, d[1]&4 != 0, int(d[1] >> 8 & 0x1f), d[1]&(1<<16) != 0}
	}
}
