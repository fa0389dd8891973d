package iommu

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu/acpi"
)

// aliases are the functions as which the firmware's IVRS table says that the DMA of others comes.
type aliases struct {
	unknown string        // what is missing of such a table, or why it could not be read; "" if nothing is
	blocks  []*acpi.Block // the IVHDs that Linux uses
}

// readAliases reads the table. A host with an IOMMU of AMD's has one, although a captured one may lack it.
func readAliases(h *Host) (aliases, error) {
	for _, f := range ReadFirmware(h) {
		if f.Signature != "IVRS" {
			continue
		}
		if errors.Is(f.Err, fs.ErrPermission) {
			return aliases{unknown: theTable + "takes root to read"}, nil
		}
		if f.Table == nil || f.Table.Fields == nil {
			return aliases{unknown: fmt.Sprintf("%scannot be read: %v", theTable, f.Err)}, nil
		}
		out, kind := aliases{}, ivhdType(f.Table)
		for i := range f.Table.Blocks {
			if b := &f.Table.Blocks[i]; b.Type == kind {
				out.blocks = append(out.blocks, b)
			}
		}
		return out, nil
	}
	units, err := h.Names(unitsDir)
	if host.Absent(err) {
		err = nil
	}
	amd := slices.ContainsFunc(units, func(name string) bool { return strings.HasPrefix(name, "ivhd") })
	if amd {
		return aliases{unknown: theTable + "is not there, or was not captured"}, err
	}
	return aliases{}, err
}

const theTable = "the firmware's IVRS table, by which devices do DMA as others, "

// of is the function as which the DMA of another one comes; false if it comes as its own. Of several entries for one
// the last counts (drivers/iommu/amd/init.c, init_iommu_from_acpi).
func (a *aliases) of(at Address) (to Address, is bool) {
	id := at.requesterID()
	for _, b := range a.blocks {
		ivhd, ok := b.Fields.(*acpi.IVHD)
		if !ok || uint32(ivhd.Segment) != at.Domain {
			continue
		}
		var from acpi.RequesterID
		var source *acpi.RequesterID // of the range that began last; nil: it is none of aliases
		for i := range b.Entries {
			switch f := b.Entries[i].Fields.(type) {
			case *acpi.AliasEntry:
				if b.Entries[i].Type == 0x43 {
					from, source = f.DeviceID, &f.SourceID
				} else if f.DeviceID == id {
					to, is = addressOf(at.Domain, f.SourceID), true
				}
			case *acpi.ExtendedEntry:
				if b.Entries[i].Type == 0x47 {
					source = nil
				}
			case *acpi.DeviceEntry:
				switch b.Entries[i].Type {
				case 0x03:
					source = nil
				case 0x04:
					if source != nil && from <= id && id <= f.DeviceID {
						to, is = addressOf(at.Domain, *source), true
					}
				}
			}
		}
	}

	return to, is && to != at
}
