package bind

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// StuckError says that a write has not returned: something holds the device. The write goes on in its child.
type StuckError struct {
	Device  iommu.Address
	What    string // the write
	Writer  holder.Proc
	Since   time.Time
	Holders []holder.Holder // whom it waits for; none if that is not known
}

func (e *StuckError) Error() string {
	var holders strings.Builder
	for _, h := range e.Holders {
		holders.WriteString("; it " + h.What)
	}
	if len(e.Holders) == 0 {
		holders.WriteString("; viaduct cannot tell what it waits for")
	}
	return fmt.Sprintf("%s is stuck: %q has not returned since %s", e.Device, e.What, e.Since.Format(time.TimeOnly)) +
		holders.String() +
		fmt.Sprintf(" (process %d goes on waiting; after that, the next change or viaduct recover does the rest)",
			e.Writer.PID)
}

// IsStuck reports whether an error is, or wraps, a *StuckError: then the device is the child's, and nothing is to be
// undone.
func IsStuck(err error) bool {
	_, stuck := errors.AsType[*StuckError](err)
	return stuck
}

// noteStuck writes down what a device's write waits for: the device is the child's until it returns.
func (b *Handle) noteStuck(err error) error {
	stuck, ok := errors.AsType[*StuckError](err)
	if !ok {
		return err
	}
	r, known, readErr := b.change(stuck.Device)
	if readErr != nil || !known {
		return errors.Join(err, readErr)
	}
	stuck.Holders = r.waitsFor(b.host)
	r.Stuck = stuck.What
	return errors.Join(err, b.journal.Put(changeKey(stuck.Device), r))
}
