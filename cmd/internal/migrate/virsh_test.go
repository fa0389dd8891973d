package migrate

import (
	"strings"
	"testing"
)

// A domain's device is found by its address on the host, and taken as it stands there.
func TestDeviceXML(t *testing.T) {
	const device = `<interface type='hostdev' managed='no'><mac address='52:54:00:aa:00:01'/>
  <source><address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/></source>
  <alias name='hostdev0'/><address type='pci' bus='0x06' slot='0x00' function='0x0'/></interface>`
	const domain = `<?xml version='1.0'?><domain type='qemu'><name>web</name><devices>
  <interface type='bridge'><mac address='52:54:00:aa:00:01'/><source bridge='br0'/></interface>
  <hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/></source></hostdev>` + device + `</devices></domain>`
	for host, want := range map[string]string{"0000:01:10.2": device, "0000:01:10.0": "", "": ""} {
		if got, err := deviceXML([]byte(domain), host); err != nil || string(got) != want {
			t.Errorf("%q: %s, %v", host, got, err)
		}
	}
	if _, err := deviceXML([]byte(strings.Replace(domain, "</source>", "", 1)), "0000:01:10.2"); err == nil {
		t.Error("a domain that breaks off has no error")
	}
}
