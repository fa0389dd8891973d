package hostfile

import (
	"encoding/json"
	"reflect"
	"testing"
)

// What is declared comes back from a record as it was, whatever its words would mean in a file.
func TestJSON(t *testing.T) {
	const text = `protect:
  - 0000:09:00.0
  - mac=52:54:00:12:34:56
roles:
  - {select: class=0c05, role: guest}
pfs:
  - select: mac=52:54:00:00:01:01 path=0000:00:01.0/00.0
    count: 8
    mtu: 9000
    eswitch: switchdev
    optional: true
    vfs:
      - {range: "0-3,6", driver: vfio, pool: "null", vlan: 100+index, mac: stable, trust: "on"}
      - {range: 4, pool: "true", mac: "52:54:00:00:02:01", node_guid: "00:11:22:33:44:55:66:00+index"}
  - {select: "8086:10c9", count: 1, vfs: [{driver: home}]}
devices:
  - {select: serial=1e3, driver: vfio-pci, node_owner: "1000:36"}
`

	declared, err := Parse("host.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}

	b, err := json.Marshal(declared)
	if err != nil {
		t.Fatal(err)
	}

	var back Host
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(*declared, back) {
		t.Errorf("%s\nbecame\n%+v\nof\n%+v", b, back, *declared)
	}

	for i := range declared.PFs {
		if !reflect.DeepEqual(declared.PFs[i].Each(), back.PFs[i].Each()) {
			t.Errorf("the VFs of PF %d are others", i)
		}
	}
}
