package lease

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	"viaduct/iommu"
	"viaduct/sriov"
)

// settings gives a lease's VFs what the guest is to have, and writes down first what they had.
func (m *Manager) settings(ctx context.Context, l *Lease, devices []*iommu.Device) (notes []string, err error) {
	if !l.Drawn {
		if err := m.before(l); err != nil {
			return nil, err
		}
	}
	return m.configure(ctx, l, devices)
}

// reconfigure gives a VF what is declared of it now, and else what it had before, and compares all that the PF's driver
// tells. What it does not tell, or does not take back, is noted.
func (m *Manager) reconfigure(ctx context.Context, dev *Device, d *iommu.Device, drawn bool, c *Certificate) error {
	pf := m.Topology.PFOf(d)
	read := func() (sriov.Settings, error) {
		port, err := sriov.ReadPort(m.host, pf)
		if err != nil {
			return nil, err
		}
		now, _ := port.Of(d.VFIndex)
		return now.Settings, nil
	}

	var err error
	if c.Found, err = read(); err != nil {
		return err
	}
	if dev.Before == nil && drawn && c.Found != nil {
		dev.Before = m.fresh(pf, d.VFIndex, c.Found)
	}
	if len(dev.Before) == 0 {
		// Nothing of it was changed.
		c.Settings, err = read()
		return err
	}
	want := maps.Clone(dev.Before)
	own, _ := m.declared.Settings(m.declaration, pf)
	maps.Copy(want, own[d.VFIndex])
	if want, err = m.giveSettings(ctx, d, want, c); err != nil {
		return err
	}
	if c.Settings, err = read(); err != nil {
		return err
	}

	var wrong []string
	for _, k := range sriov.Keys() {
		is, told := c.Settings[k]
		switch value, known := want[k]; {
		case !known:
		case !told:
			c.note("viaduct cannot check that its %s is %s again, because its driver does not report it", k, value)
		case is != value:
			wrong = append(wrong, fmt.Sprintf("%s is %s instead of %s", k, is, value))
		}
	}

	if len(wrong) > 0 {
		return errors.New("its settings are wrong: " + strings.Join(wrong, ", "))
	}
	return nil
}

// giveSettings gives a VF settings, and returns them as they are to be read back. Some drivers take no address away: a
// VF that had none keeps its guest's, then.
func (m *Manager) giveSettings(ctx context.Context, d *iommu.Device, want sriov.Settings,
	c *Certificate) (sriov.Settings, error) {
	give := func() (sriov.Settings, error) {
		plan, err := m.planSet(d, want)
		if err != nil {
			return nil, err
		}
		_, err = m.handle.Set(ctx, plan)
		return plan.Want, err
	}
	given, err := give()
	if err == nil || want[sriov.MAC] != noMAC || !keepsMAC(err) {
		return given, err
	}
	delete(want, sriov.MAC)
	if given, again := give(); again == nil {
		c.note("it had no MAC address, and its driver does not remove the guest's: %s", err)
		return given, nil
	}
	return nil, err
}

// keepsMAC reports whether a VF could not be set because its driver does not take an address from it.
func keepsMAC(err error) bool {
	refused, ok := errors.AsType[*sriov.SettingError](err)
	return ok && refused.Keys == string(sriov.MAC) || errors.Is(err, sriov.ErrIgnored)
}

// fresh is what a VF is to have that libvirt configured before it was seen: what is declared of it, and else what VFs
// begin with. Its MAC address libvirt has put back itself.
func (m *Manager) fresh(pf *iommu.Device, index int, found sriov.Settings) sriov.Settings {
	own, _ := m.declared.Settings(m.declaration, pf)
	out := sriov.Settings{}
	for k, now := range found {
		usual, known := k.Default()
		switch value, declared := own[index][k]; {
		case k == sriov.MAC:
			out[k] = now
		case declared:
			out[k] = value
		case known:
			out[k] = usual
		}
	}
	return out
}
