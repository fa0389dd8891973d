package iommu

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"viaduct/internal/host/hosttest"
)

// The devices on a USB controller's bus have names, also in a snapshot of their host.
func TestUSBDevices(t *testing.T) {
	const hub = "usb1/1-2"
	to := func(up string) string { return "-> " + up + "bus/usb" }
	tree := hosttest.Made(hosttest.PCI{
		At: "0000:00:14.0", ID: "8086:43ed", Class: "0c0330", Driver: "xhci_hcd", Group: 1,
		Files: hosttest.Tree{
			"usb1/subsystem": to("../../../../"), "usb1/idVendor": "1d6b\n", "usb1/product": "xHCI Host Controller\n",
			hub + "/subsystem": to("../../../../../"), hub + "/idVendor": "05e3\n", hub + "/idProduct": "0610\n",
			hub + "/1-2:1.0/subsystem": to("../../../../../../"),
			hub + "/1-2.4/subsystem":   to("../../../../../../"),
			hub + "/1-2.4/idVendor":    "046d\n", hub + "/1-2.4/idProduct": "c52b\n",
			hub + "/1-2.4/manufacturer": "Logitech\n", hub + "/1-2.4/product": "USB Receiver\n",
		},
	})

	want := []USBDevice{{"1-2", 0x05e3, 0x0610, ""}, {"1-2.4", 0x046d, 0xc52b, "Logitech USB Receiver"}}
	var snapshot bytes.Buffer
	h := hostOf(t, tree)
	if err := Capture(h, &snapshot); err != nil {
		t.Fatal(err)
	}

	file := filepath.Join(t.TempDir(), "host.tar.gz")
	if err := os.WriteFile(file, snapshot.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}

	captured, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer captured.Close()
	for name, h := range map[string]*Host{"folder": h, "snapshot": captured} {
		got, err := USBDevices(h, addr(t, "0000:00:14.0"))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}
