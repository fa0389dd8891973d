package hostfile

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"
)

// Values of a command line may have the index added, as those of a file, and say for which VF they are none.
func TestParseValues(t *testing.T) {
	v, err := ParseValues([]string{"vlan=100+index", "trust=on"})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := v.Of(15); err != nil || s.Text() != "vlan=115 trust=on" {
		t.Errorf("%q, %v", s.Text(), err)
	}
	if _, err := v.Of(4000); err == nil || !strings.Contains(err.Error(), "vf4000: vlan=4100") {
		t.Errorf("beyond the last VLAN: %v", err)
	}
	for text, says := range map[string]string{
		"spoof=on": "did you mean spoofchk?", "vlan": "want KEY=VALUE", "mac=stable+index": "only numbers",
		"vlan=x+index": "vlan=x+index",
		"vln=1+index":  "did you mean vlan?", "trust=on+index": "only numbers", "vlan=1 vlan=2+index": "given twice",
		"vlan=1 vlan=2": "given twice",
	} {
		if _, err := ParseValues(strings.Fields(text)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", text, err, says)
		}
	}
}

// Values are in records and in JSON as they are typed, and come back the same.
func TestValuesJSON(t *testing.T) {
	v, err := ParseValues([]string{"vlan=100+index", "mac=stable", "node_guid=00:11:22:33:44:55:66:00+index"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(v)
	if want := `{"mac":"stable","node_guid":"00:11:22:33:44:55:66:00+index","vlan":"100+index"}`; err != nil ||
		string(b) != want {
		t.Fatalf("%s, %v", b, err)
	}
	var back Values
	if err := json.Unmarshal(b, &back); err != nil || !maps.Equal(v, back) {
		t.Errorf("%v, %v", back, err)
	}
}
