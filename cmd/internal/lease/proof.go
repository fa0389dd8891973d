package lease

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"time"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// That nobody has a device is proved by the kernel. A look at processes names who has it, and can miss one: memory that
// is mapped and whose descriptor is closed, a descriptor on its way over a socket, a thread's own table.

// hold keeps everybody from the devices of a lease while they are reset and set.
type hold struct {
	claim *vfio.Claim
	also  []io.Closer // what has devices open that were left out of the claim since

	shared []*iommu.Device // whose nodes others than root could open
}

// Close lets go of the devices; again is no error.
func (h *hold) Close() error {
	errs := []error{h.claim.Close()}
	for _, c := range h.also {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

type holds []*hold

func (all holds) Close() error {
	var errs []error
	for _, h := range all {
		errs = append(errs, h.Close())
	}
	return errors.Join(errs...)
}

// open opens a device in a context instead of claiming it.
func (h *hold) open(space *vfio.Context, d *iommu.Device) (*vfio.Device, error) {
	if err := h.claim.Drop(d); err != nil {
		return nil, err
	}
	return space.Open(d.Name)
}

// prove takes the nodes of devices that are on VFIO drivers from their owner, and proves that nobody has the devices,
// now or while the hold lasts. Who has one is waited for until the end given, and is a holder.RefusedError then. A node
// of a device's own can be open without being used yet: where others than root may have opened it, or it was lent, the
// device lets go of who has it so.
func (m *Manager) prove(ctx context.Context, what string, devices []*iommu.Device, lent bool,
	end time.Time) (h *hold, err error) {
	var taken, shared, cut []*iommu.Device
	for _, d := range devices {
		if !d.VFIO {
			continue
		}
		others, err := m.handle.Disown(d)
		if err != nil {
			return nil, err
		}
		taken = append(taken, d)
		if others {
			shared = append(shared, d)
		}
		nodes, err := vfio.Nodes(m.host, d)
		if err != nil {
			return nil, err
		}
		own := func(node string) bool { return path.Dir(node) == "/dev/vfio/devices" }
		if (others || lent) && slices.ContainsFunc(nodes, own) {
			cut = append(cut, d)
		}
	}

	h, err = m.hold(ctx, what, taken, end)
	if err == nil && len(cut) > 0 {
		if err = h.Close(); err != nil {
			return nil, err
		}
		for _, d := range cut {
			if err := m.letGo(what, d); err != nil {
				return nil, err
			}
		}
		h, err = m.hold(ctx, what, taken, time.Now())
	}
	if err == nil {
		h.shared = shared
	}
	return h, err
}

// hold claims devices, once nobody has them any more.
func (m *Manager) hold(ctx context.Context, what string, devices []*iommu.Device, end time.Time) (*hold, error) {
	for {
		claim, err := vfio.NewClaim(m.host, devices...)
		if err == nil {
			return &hold{claim: claim}, nil
		}
		if !errors.Is(err, vfio.ErrInUse) {
			return nil, err
		}
		left := time.Until(end)
		if left <= 0 || ctx.Err() != nil {
			return nil, hidden(what, "it", err, "end the process that has it first: a guest, or what a guest has "+
				"left behind")
		}

		// The kernel tells nobody of it.
		select {
		case <-ctx.Done():
		case <-time.After(min(left, 100*time.Millisecond)):
		}
	}
}

// hidden refuses what somebody has open whom only the kernel knows.
func hidden(what, open string, err error, hint string) error {
	why := holder.Reason{
		Kind: holder.ReasonKind(holder.Process), Err: err,
		Text: "somebody whom /proc does not show has " + open + " open: " + err.Error(),
	}
	return holder.Because(what, why, hint)
}

// letGo takes a device off its VFIO driver and gives it back, which ends only when nobody has its own node open. What
// cannot be given back stays written down, for the next change of the device to do it.
func (m *Manager) letGo(what string, d *iommu.Device) error {
	driver := d.Driver
	if err := m.handle.Begin(opLetGo, d, []*iommu.Device{d}, driver); err != nil {
		return err
	}
	off := bind.Step{Path: path.Join("sys/bus/pci/drivers", driver, "unbind"), Value: d.Name}
	err := m.handle.Write(d.Address, []bind.Step{off, backTo(driver, d.Address)})
	if bind.IsStuck(err) {
		return hidden(what, "its node", err, "end the process that has it, and try again")
	}

	now, readErr := iommu.ReadDriver(m.host, d.Address)
	if err != nil && readErr == nil && now == "" {
		err = errors.Join(err, m.handle.Write(d.Address, []bind.Step{backTo(driver, d.Address)}))
		now, readErr = iommu.ReadDriver(m.host, d.Address)
	}
	switch {
	case readErr != nil:
		return errors.Join(err, readErr)
	case now != driver:
		return errors.Join(err, fmt.Errorf("%s was on %s, and no longer is", d.Name, driver))
	}
	return errors.Join(err, m.handle.End(d.Address))
}

func backTo(driver string, a iommu.Address) bind.Step {
	return bind.Step{Path: path.Join("sys/bus/pci/drivers", driver, "bind"), Value: a.String()}
}

// recorded has a reset written down while it lasts.
func (m *Manager) recorded(d *iommu.Device, do func() error) error {
	if err := m.handle.Begin(opReset, d, []*iommu.Device{d}, nil); err != nil {
		return err
	}
	err := do()
	if bind.IsStuck(err) {
		return err
	}
	return errors.Join(err, m.handle.End(d.Address))
}

const (
	opReset = "reset"
	opLetGo = "let-go"
)

// Recoverers end what was interrupted; for the options of a Handle.
func Recoverers() map[string]bind.Recoverer {
	return map[string]bind.Recoverer{
		opReset: func(context.Context, *bind.Handle, iommu.Address, json.RawMessage) (string, error) {
			return "was being reset when viaduct was interrupted: run the release again", nil
		},
		opLetGo: func(_ context.Context, b *bind.Handle, a iommu.Address, data json.RawMessage) (string, error) {
			var driver string
			if err := json.Unmarshal(data, &driver); err != nil {
				return "", err
			}
			now, err := iommu.ReadDriver(b.Host(), a)
			if err == nil && now == "" {
				err = b.Write(a, []bind.Step{backTo(driver, a)})
			}
			if err != nil && !host.Absent(err) {
				return "", err
			}
			return "is on " + driver + " again, after viaduct was interrupted: run the release again", nil
		},
	}
}
