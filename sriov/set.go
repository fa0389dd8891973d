package sriov

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
	"viaduct/vfio"
)

const msixFile = "sriov_vf_msix_count"

// SettingError says which setting of a VF a PF's driver refused.
type SettingError struct {
	Keys   string
	VF     string
	Driver string
	Err    error
}

func (e *SettingError) Error() string {
	switch {
	case errors.Is(e.Err, unix.EOPNOTSUPP):
		return fmt.Sprintf("%s: driver %s has no setting %s for VFs", e.VF, e.Driver, e.Keys)
	case errors.Is(e.Err, unix.EPROTONOSUPPORT):
		return fmt.Sprintf("%s: driver %s has no VLAN protocol but 802.1q", e.VF, e.Driver)
	}
	hint := ""
	if errors.Is(e.Err, unix.EINVAL) && strings.Contains(e.Keys, string(MaxRate)) {
		hint = " (rates need the PF's link to be up, and go up to its speed; many drivers have no min_tx_rate)"
	}
	return fmt.Sprintf("%s: driver %s refused %s: %v%s", e.VF, e.Driver, e.Keys, e.Err, hint)
}

func (e *SettingError) Unwrap() error { return e.Err }

// transient refusals come right after a VF was reset, and end with that.
const (
	retries    = 8
	firstPause = 10 * time.Millisecond // doubled each time: 2.5 s in all
)

// change makes one setting of a VF.
func (p *Port) change(ctx context.Context, b *vfio.Binder, vf *iommu.Device, s Setting) error {
	if s.Keys[0] == MSIX {
		err := b.Write(p.PF.Address, []vfio.Step{{Path: attribute(vf.Address, msixFile), Value: s.To[MSIX]}})
		if errors.Is(err, unix.ENOENT) {
			err = unix.EOPNOTSUPP
		}
		if err != nil {
			return &SettingError{"msix", vf.Name, p.PF.Driver, err}
		}
		return nil
	}
	pause := firstPause
	for try := 1; ; try++ {
		err := p.send(vf.VFIndex, s)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EBUSY) || try == retries {
			return &SettingError{s.Keys.name(), vf.Name, p.PF.Driver, err}
		}
		select {
		case <-time.After(pause):
			pause *= 2
		case <-ctx.Done():
			return &SettingError{s.Keys.name(), vf.Name, p.PF.Driver, err}
		}
	}
}

// SetPlan is what it takes to set a VF.
type SetPlan struct {
	VF       *iommu.Device
	Want     Settings
	Settings []Setting // none: all is as wanted
	port     *Port
}

// Commands are the plan as shell commands.
func (p *SetPlan) Commands() []string {
	var out []string
	for _, s := range p.Settings {
		out = append(out, s.command(p.port.Name, p.VF))
	}
	return out
}

// Restores reports whether the plan only brings back what was asked for before.
func (p *SetPlan) Restores(asked Settings) bool {
	for _, s := range p.Settings {
		for _, k := range s.Keys {
			if v, wanted := p.Want[k]; wanted && asked[k] != v {
				return false
			}
		}
	}
	return true
}

// PlanSet plans how a VF of a PF gets settings. It refuses what can be told to be wrong beforehand: interrupt vectors while the
// VF has a driver, a MAC address that something else on this host has.
func PlanSet(h *iommu.Host, pf, vf *iommu.Device, want Settings) (*SetPlan, error) {
	port, err := ReadPort(h, pf)
	if err != nil {
		return nil, err
	}
	links, err := linksIfAsked(h, []VFWish{{Settings: want}})
	if err != nil {
		return nil, err
	}
	return planSet(h, pf, vf, want, port, links)
}

// PlanSets plans how VFs of a PF get the settings of their wishes, with one look at all. What the driver does not report is taken
// to be as it was last set.
func PlanSets(b *vfio.Binder, pf *iommu.Device, vfs []*iommu.Device, wish []VFWish) ([]*SetPlan, error) {
	port, err1 := ReadPort(b.Host, pf)
	links, err2 := linksIfAsked(b.Host, wish)
	asked, err3 := Asked(b, pf)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	var out []*SetPlan
	for _, vf := range vfs {
		now, _ := port.Of(vf.VFIndex)
		want := maps.Clone(wish[vf.VFIndex].Settings)
		maps.DeleteFunc(want, func(k Key, v string) bool {
			_, known := now.Settings[k]
			return !known && asked[vf.VFIndex][k] == v
		})
		p, err := planSet(b.Host, pf, vf, want, port, links)
		if err != nil {
			return nil, err
		}
		if len(p.Settings) > 0 {
			out = append(out, p)
		}
	}
	return out, nil
}

func planSet(h *iommu.Host, pf, vf *iommu.Device, want Settings, port *Port, links []linkInfo) (*SetPlan, error) {
	want, err := resolved(h, pf, vf, want, port)
	if err != nil {
		return nil, err
	}
	if _, asked := want[MSIX]; asked && vf.Driver != "" {
		return nil, fmt.Errorf("%s is on driver %s: its interrupt vectors can be set only while it has none", vf.Name, vf.Driver)
	}
	if port == nil {
		for k := range want {
			if k != MSIX {
				return nil, fmt.Errorf("%s has no network interface, so its VFs have no %s to set", pf.Name, k)
			}
		}
		port = &Port{PF: pf}
	}
	if err := ownedByNone(links, want[MAC], port, vf); err != nil {
		return nil, err
	}
	now, _ := port.Of(vf.VFIndex)
	return &SetPlan{VF: vf, Want: want, Settings: planSettings(now.Settings, want), port: port}, nil
}

// vfAt is a VF as far as its settings need to know it.
func vfAt(pf, vf iommu.Address, index int) *iommu.Device {
	return &iommu.Device{Name: vf.String(), Address: vf, PCI: true, PhysFn: &pf, VFIndex: index}
}

// planNew plans the settings of VFs that are still to be made.
func planNew(h *iommu.Host, pf *iommu.Device, vfs []VFWish) ([]SetPlan, error) {
	port, err1 := ReadPort(h, pf)
	links, err2 := linksIfAsked(h, vfs)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	var out []SetPlan
	macs := map[string]bool{}
	for i, a := range iommu.VFAddresses(h, pf.Address) {
		if i == len(vfs) {
			break
		}
		vf := vfAt(pf.Address, a, i)
		mac := vfs[i].Settings[MAC]
		if macs[mac] {
			return nil, fmt.Errorf("mac=%s for several VFs: each needs one of its own (mac=%s makes them)", mac, StableMAC)
		}
		macs[mac] = mac != "" && mac != StableMAC && mac != noMAC
		p, err := planSet(h, pf, vf, vfs[i].Settings, port, links)
		if err != nil {
			return nil, err
		}
		p.Settings = planSettings(Settings{}, p.Want)
		out = append(out, *p)
	}
	return out, nil
}

// configure gives all VFs of a PF their settings. On failure its caller removes them.
func configure(ctx context.Context, b *vfio.Binder, pf iommu.Address, vfs []*iommu.Device, wish []VFWish) error {
	if !anyVF(wish, hasSettings) || !b.Host.Live() {
		return nil
	}
	d, port, err := portOf(b.Host, pf)
	if err != nil {
		return err
	}
	if port == nil {
		port = &Port{PF: d}
	}
	if port.index != 0 {
		if err := port.open(); err != nil {
			return err
		}
		defer port.close()
	}
	var plans []SetPlan
	for i, vf := range vfs {
		if !hasSettings(wish[i]) {
			continue
		}
		want, err := resolved(b.Host, d, vf, wish[i].Settings, port)
		if err != nil {
			return err
		}
		if vf.Driver != "" { // an interrupted run has come as far as that
			want = maps.Clone(want)
			delete(want, MSIX)
		}
		now, _ := port.Of(vf.VFIndex)
		p := SetPlan{VF: vf, Want: want, Settings: planSettings(now.Settings, want), port: port}
		if _, err := p.make(ctx, b); err != nil {
			return err
		}
		plans = append(plans, p)
	}
	now, err := port.again()
	if err != nil {
		return err
	}
	for _, p := range plans {
		if _, err := p.verify(now); err != nil {
			return err
		}
	}
	return remember(b, d, plans...)
}

// noMAC has a driver make up an address, or none.
const noMAC = "00:00:00:00:00:00"

// resolved puts the address that "stable" stands for in its place.
func resolved(h *iommu.Host, pf *iommu.Device, vf *iommu.Device, want Settings, port *Port) (Settings, error) {
	if want[MAC] != StableMAC {
		return want, nil
	}
	if port == nil || port.Name == "" {
		return nil, fmt.Errorf("%s has no network interface to derive a MAC address from", pf.Name)
	}
	permanent, err := net.ParseMAC(port.permanentMAC(h))
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", port.Name, err)
	}
	mac, err := DeriveMAC(permanent, vf.VFIndex)
	if err != nil {
		return nil, err
	}
	out := maps.Clone(want)
	out[MAC] = mac.String()
	return out, nil
}

// linksIfAsked are the interfaces of this host that devices have, each with its VFs, if a MAC address is wanted.
func linksIfAsked(h *iommu.Host, vfs []VFWish) ([]linkInfo, error) {
	if !h.Live() || !anyVF(vfs, func(vf VFWish) bool { return vf.Settings[MAC] != "" && vf.Settings[MAC] != noMAC }) {
		return nil, nil
	}
	names, err := h.Names(netClass)
	if err != nil {
		return nil, err
	}
	k, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer k.close()
	var out []linkInfo
	for _, n := range names {
		device, err := h.LinkBase(path.Join(netClass, n, "device"))
		if err != nil {
			continue // of no device
		}
		l, err := k.link(n, 0)
		if errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("interface %s: %w", n, err)
		}
		l.device = device
		out = append(out, l)
	}
	return out, nil
}

// ownedByNone refuses a MAC address that something else on this host has: a device's interface, or another VF.
func ownedByNone(links []linkInfo, mac string, port *Port, vf *iommu.Device) error {
	for _, l := range links {
		if l.device != vf.Name && l.address.String() == mac {
			return fmt.Errorf("MAC address %s is that of %s already", mac, l.name)
		}
		for _, other := range l.vfs {
			if other.Settings[MAC] == mac && (l.index != port.index || other.Index != vf.VFIndex) {
				return fmt.Errorf("MAC address %s is that of vf%d of %s already", mac, other.Index, l.name)
			}
		}
	}
	return nil
}

// opSet is the kind of the record of settings that change.
const opSet = "set"

type setRecord struct {
	VF    iommu.Address `json:"vf"`
	Index int           `json:"index"`
	Old   Settings      `json:"old"`
}

// Unverified is the note for the user on what Set could not read back; none if there is nothing of that.
func Unverified(vf *iommu.Device, keys []string) []string {
	if len(keys) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("%s: set, not verifiable, as the driver does not report it: %s", vf.Name, strings.Join(keys, ", "))}
}

// Set carries out a plan, for a PF and a VF that the caller has locked: all of it or, undone, nothing. It reads back what came
// of it, and names the keys that the driver takes and does not report.
func Set(ctx context.Context, b *vfio.Binder, p *SetPlan) (unverified []string, err error) {
	if len(p.Settings) == 0 {
		return nil, remember(b, p.port.PF, *p)
	}
	r := setRecord{p.VF.Address, p.VF.VFIndex, Settings{}}
	for _, s := range p.Settings {
		maps.Copy(r.Old, s.From)
	}
	if err := b.Begin(opSet, p.port.PF, nil, r); err != nil {
		return nil, err
	}
	unverified, err = set(ctx, b, p)
	if _, stuck := errors.AsType[*vfio.StuckError](err); stuck {
		return nil, err
	}
	if err == nil {
		err = remember(b, p.port.PF, *p)
	}
	return unverified, errors.Join(err, b.End(p.port.PF.Address))
}

// set makes the settings of a plan, and undoes those it made when one fails.
func set(ctx context.Context, b *vfio.Binder, p *SetPlan) (unverified []string, err error) {
	done, err := p.make(ctx, b)
	if _, stuck := errors.AsType[*vfio.StuckError](err); stuck {
		return nil, err
	}
	if err == nil {
		var port *Port
		if port, err = p.port.again(); err == nil {
			unverified, err = p.verify(port)
		}
	}
	if err != nil {
		err = errors.Join(err, p.undo(b, p.Settings[:done]))
	}
	return unverified, err
}

// make makes the settings of a plan until one fails, and says how many it made.
func (p *SetPlan) make(ctx context.Context, b *vfio.Binder) (done int, err error) {
	for _, s := range p.Settings {
		if ctx.Err() != nil {
			return done, fmt.Errorf("%s: interrupted before %s", p.VF.Name, s.Keys.name())
		}
		if err := p.port.change(ctx, b, p.VF, s); err != nil {
			return done, err
		}
		done++
	}
	return done, nil
}

// verify compares with what the port now reports.
func (p *SetPlan) verify(port *Port) (unverified []string, err error) {
	now, _ := port.Of(p.VF.VFIndex)
	changed := Settings{}
	for _, s := range p.Settings {
		maps.Copy(changed, s.To)
	}
	wrong, unknown := compare(now.Settings, changed)
	if len(wrong) > 0 {
		return nil, fmt.Errorf("%s: driver %s reported success, but %s", p.VF.Name, p.port.PF.Driver, strings.Join(wrong, "; "))
	}
	return unknown, nil
}

// undo sets what was set before, in reverse order. It has no context: that of the command may be over.
func (p *SetPlan) undo(b *vfio.Binder, done []Setting) error {
	var errs []error
	for _, s := range slices.Backward(done) {
		back := Setting{Keys: s.Keys, From: s.To, To: s.From}
		if len(back.To) == 0 {
			errs = append(errs, fmt.Errorf("%s: %s cannot be put back, as the driver does not report it", p.VF.Name, s.Keys.name()))
			continue
		}
		errs = append(errs, p.port.change(context.Background(), b, p.VF, back))
	}
	return errors.Join(errs...)
}

// recoverSet puts a VF's settings back as they were.
func recoverSet(ctx context.Context, b *vfio.Binder, pf iommu.Address, data json.RawMessage) (string, error) {
	var r setRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return "has a record that cannot be read", err
	}
	_, port, err := portOf(b.Host, pf)
	if err != nil {
		return "cannot be read", err
	}
	if port == nil {
		return "has no interface any more", nil
	}
	vf := vfAt(pf, r.VF, r.Index)
	now, known := port.Of(r.Index)
	if !known {
		return fmt.Sprintf("has no vf%d any more, whose change of settings had been interrupted", r.Index), nil
	}
	for _, s := range planSettings(now.Settings, r.Old) {
		err := port.change(ctx, b, vf, s)
		if _, stuck := errors.AsType[*vfio.StuckError](err); stuck {
			return "is not done", err
		}
		if err != nil { // told once: a record that stays would keep the PF from all further changes
			return "is not done", errors.Join(err, b.End(pf))
		}
	}
	return fmt.Sprintf("has the old settings of vf%d: their change had been interrupted", r.Index), nil
}
