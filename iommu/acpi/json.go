package acpi

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// MarshalJSON gives the header and the fixed part as one object, with the blocks in "blocks". The types of IVRS's
// blocks and entries are as in its specification, "40h"; those of the other tables are numbers.
func (t *Table) MarshalJSON() ([]byte, error) {
	blocks := []json.RawMessage{}
	for _, b := range t.Blocks {
		entries := []json.RawMessage{}
		for _, e := range b.Entries {
			j, err := joined(t.part(e.Type, e.Name, e.Offset, e.Length), e.Fields)
			if err != nil {
				return nil, err
			}
			entries = append(entries, j)
		}
		j, err := joined(t.part(b.Type, b.Name, b.Offset, b.Length), b.Fields)
		if err != nil {
			return nil, err
		}
		if j, err = joined(j, map[string]any{"entries": entries}); err != nil {
			return nil, err
		}
		blocks = append(blocks, j)
	}

	head := struct {
		Signature       string `json:"signature"`
		Length          uint32 `json:"length"`
		Revision        uint8  `json:"revision"`
		Checksum        uint8  `json:"checksum"`
		OEMID           string `json:"oem_id"`
		OEMTableID      string `json:"oem_table_id"`
		OEMRevision     uint32 `json:"oem_revision"`
		CreatorID       string `json:"creator_id"`
		CreatorRevision uint32 `json:"creator_revision"`
	}(t.Header)
	fixed, err := joined(head, t.Fields)
	if err != nil {
		return nil, err
	}
	return joined(fixed, map[string]any{"blocks": blocks})
}

// partJSON is what blocks and entries have in common.
type partJSON struct {
	Type   any     `json:"type"`
	Name   *string `json:"name"`
	Offset int     `json:"offset"`
	Length int     `json:"length"`
}

func (t *Table) part(kind int, name string, offset, length int) partJSON {
	p := partJSON{Type: t.typeOf(kind, name), Offset: offset, Length: length}
	if name != "" {
		p.Name = &name
	}
	return p
}

// typeOf is how a type stands in JSON. What has no number in its specification stands by its name.
func (t *Table) typeOf(kind int, name string) any {
	switch {
	case kind < 0:
		return name
	case t.Signature == "IVRS":
		return fmt.Sprintf("%02Xh", kind)
	}
	return kind
}

// joined is one object with the members of two; b may be nil.
func joined(a, b any) (json.RawMessage, error) {
	one, err := json.Marshal(a)
	if err != nil || b == nil {
		return one, err
	}
	two, err := json.Marshal(b)
	if err != nil || bytes.Equal(two, []byte("{}")) {
		return one, err
	}
	return append(append(one[:len(one)-1], ','), two[1:]...), nil
}
