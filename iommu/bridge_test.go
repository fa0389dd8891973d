package iommu

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// bridged is a host with a bridge that keeps VLANs apart, and what else a migration's check reads.
func bridged() hosttest.Tree {
	return join(rich(), hosttest.Tree{
		"sys/class/net/br0":                                 "-> ../../devices/virtual/net/br0",
		"sys/devices/virtual/net/br0/address":               "52:54:00:00:00:01\n",
		"sys/devices/virtual/net/br0/mtu":                   "9000\n",
		"sys/devices/virtual/net/br0/flags":                 "0x1003\n",
		"sys/devices/virtual/net/br0/bridge/vlan_filtering": "1\n",
		"sys/devices/virtual/net/br0/bridge/default_pvid":   "1\n",
		"sys/devices/virtual/net/br0/brif/enp1s0":           "-> ../../../../pci0000:00/enp1s0/brport",
		"viaduct/bridge-vlans":                              "enp1s0 1 pvid untagged\nenp1s0 100\n",
		"viaduct/firmware-versions":                         "enp1s0 1.2.3, 0x8000\n",
		"proc/net/vlan/config": "VLAN Dev name\t | VLAN ID\nName-Type: " +
			"VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\nenp1s0.7       | 7  | enp1s0\n",
		"proc/cpuinfo": "processor\t: 0\nvendor_id\t: " +
			"GenuineIntel\n\nprocessor\t: 1\nvendor_id\t: GenuineIntel\n\n",
		"proc/meminfo":                 "MemTotal:  16 kB\n",
		"run/viaduct/lease-web.json":   "{\"guest\": \"web\"}\n",
		"run/viaduct/command-web.json": "{\"secret\": 1}\n",
	})
}

// Bridges, VLANs and firmware of a snapshot are those of the host; the words of a guest's VMM are in none.
func TestBridges(t *testing.T) {
	source := hostOf(t, bridged())
	var b bytes.Buffer
	if err := Capture(source, &b); err != nil {
		t.Fatal(err)
	}

	file := filepath.Join(t.TempDir(), "snapshot")
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}

	snapshot, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer snapshot.Close()
	for what, h := range map[string]*Host{"host": source, "snapshot": snapshot} {
		want := []Bridge{{Name: "br0", Address: "52:54:00:00:00:01", MTU: 9000, Up: true, Filtering: true, PVID: 1,
			Ports: []BridgePort{{Name: "enp1s0", VLANs: []PortVLAN{{ID: 1, PVID: true, Untagged: true}, {ID: 100}}}}}}
		if got, err := Bridges(h); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
		if got, err := VLANInterfaces(h); err != nil || !reflect.DeepEqual(got, []VLANInterface{{"enp1s0.7", 7,
			"enp1s0"}}) {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
		if got, err := FirmwareVersion(h, "enp1s0"); err != nil || got != "1.2.3, 0x8000" {
			t.Errorf("%s: firmware %q, %v", what, got, err)
		}
	}

	if text, _ := snapshot.String("proc/cpuinfo"); strings.Count(text, "vendor_id") != 1 {
		t.Errorf("cpuinfo of more than one CPU: %q", text)
	}
	if !snapshot.Exists("run/viaduct/lease-web.json") || snapshot.Exists("run/viaduct/command-web.json") {
		t.Error("the lease is to be in a snapshot, and the words of the VMM's command are not")
	}
}
