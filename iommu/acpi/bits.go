package acpi

import (
	"encoding/json"
	"fmt"
)

// bit names the bits lo to hi of a register or a set of flags. Of more than one bit the value is part of the name.
type bit struct {
	lo, hi int
	name   string
}

// named are the names of the bits that are set, and the values of the fields of more bits that are not zero.
func named(v uint64, bits []bit) []string {
	set := []string{}
	for _, b := range bits {
		switch n := v >> b.lo & (1<<(b.hi-b.lo+1) - 1); {
		case n == 0:
		case b.lo == b.hi:
			set = append(set, b.name)
		default:
			set = append(set, fmt.Sprintf("%s=%d", b.name, n))
		}
	}
	return set
}

// bitsJSON is how flags and registers stand in JSON: as they are, and by name.
func bitsJSON(v uint64, names []string) ([]byte, error) {
	return json.Marshal(struct {
		Raw Hex      `json:"raw"`
		Set []string `json:"set"`
	}{Hex(v), names})
}
