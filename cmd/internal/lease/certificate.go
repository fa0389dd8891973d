package lease

import (
	"fmt"
	"time"

	"viaduct/iommu"
	"viaduct/sriov"
)

// Certificate is what came of the scrub of a device that a guest had.
type Certificate struct {
	Guest    string         `json:"guest"`
	Address  iommu.Address  `json:"address"`
	ID       iommu.ID       `json:"id"`
	Place    string         `json:"place,omitempty"` // its physical path
	Time     time.Time      `json:"time"`
	Result   Result         `json:"result"`
	Why      string         `json:"why,omitempty"`      // it is not clean
	Reset    string         `json:"reset,omitempty"`    // the ways to reset it, the first of which the kernel took
	Found    sriov.Settings `json:"found,omitempty"`    // what it had
	Settings sriov.Settings `json:"settings,omitempty"` // what it has now, read back
	Driver   string         `json:"driver,omitempty"`   // that it is on now
	Note     string         `json:"note,omitempty"`     // what was not cleaned, or is not known
}

// Result is how a scrub ended.
type Result string

// note adds to what a certificate tells beside its result.
func (c *Certificate) note(format string, a ...any) {
	if c.Note != "" {
		c.Note += "; "
	}
	c.Note += fmt.Sprintf(format, a...)
}

// nvmeClass is the base class and subclass of NVMe controllers.
const nvmeClass = 0x0108
