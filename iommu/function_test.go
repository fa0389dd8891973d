package iommu

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// An igb of the lab, whose capabilities are all there.
func TestDecodeFunction(t *testing.T) {
	host := hosttest.Load(t, "../internal/host/hosttest/testdata/why.txt")
	config := host["sys/devices/pci0000:00/0000:00:06.0/0000:02:00.0/config"]
	f, err := DecodeFunction(strings.NewReader(config), len(config))
	if err != nil {
		t.Fatal(err)
	}
	want := Function{
		Vendor: 0x8086, Device: 0x10c9, Class: 0x020000, Whole: true, ExtendedWhole: true,
		Capabilities: []Capability{{0x01, 0x40}, {0x05, 0x50}, {0x11, 0x70}, {0x10, 0xa0}},
		Extended:     []Capability{{0x01, 0x100}, {0x0e, 0x150}, {0x10, 0x160}},
		Express:      &Express{Type: Endpoint, FunctionReset: true},
		Power:        &Power{SoftReset: true},
		ARI:          &ARI{},
		SRIOV: &SRIOVCapability{
			Enabled: true, ARI: true, Initial: 8, Total: 8, VFs: 2, Offset: 128, Stride: 2, VFDevice: 0x10ca,
			PageSizes: 0x553,
		},
	}
	if !reflect.DeepEqual(*f, want) || !f.FLR() {
		t.Errorf("%+v\n%+v\nwant %+v", *f, *f.SRIOV, want)
	}

	// Cut anywhere, it says that something is missing wherever it lacks a capability.
	for size := range config {
		f, err := DecodeFunction(strings.NewReader(config[:size]), len(config))
		switch {
		case size < 64 && err == nil, size >= 64 && err != nil:
			t.Fatalf("%d bytes: %v", size, err)
		case err != nil:
		case f.Whole && f.Express == nil, !f.Whole && f.ExtendedWhole, f.ExtendedWhole && f.SRIOV == nil:
			t.Fatalf("%d bytes: %+v", size, f)
		}
	}
	if f, err := DecodeFunction(strings.NewReader(config[:0x100]), 0x100); err != nil || !f.ExtendedWhole ||
		f.SRIOV != nil {
		t.Errorf("256 bytes of which the kernel reaches no more: %+v, %v", f, err)
	}
	if _, err := DecodeFunction(strings.NewReader(strings.Repeat("\xff", 4096)), 4096); err == nil {
		t.Error("a device that does not answer is decoded")
	}
}

func FuzzFunction(f *testing.F) {
	f.Add([]byte(part{path: port, kind: RootPort, acs: on}.config()), 4096)
	f.Add([]byte(part{path: port, kind: none, class: 0x060700}.config()), 256)
	f.Add(chain(4096, map[int][2]int{0x100: {0x10, 0x200}, 0x200: {0x0d, 0x100}}), 4096)
	f.Fuzz(func(t *testing.T, b []byte, size int) {
		got, err := DecodeFunction(bytes.NewReader(b), size)
		if (err == nil) != (got != nil) {
			t.Fatalf("%+v, %v", got, err)
		}
		if err != nil {
			return
		}
		if len(got.Capabilities) > 48 || len(got.Extended) > 480 || got.ExtendedWhole && !got.Whole {
			t.Errorf("%+v", got)
		}
		for _, c := range append(got.Capabilities, got.Extended...) {
			if c.Offset < 0x40 || c.Offset+4 > len(b) {
				t.Errorf("a capability at %#x of %#x bytes", c.Offset, len(b))
			}
		}
	})
}
