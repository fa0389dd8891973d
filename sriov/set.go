package sriov

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// SettingError says which setting of a VF a PF's driver refused. It wraps the errno.
type SettingError struct {
	Keys   string
	VF     string
	Driver string
	Err    error
}

func (e *SettingError) Error() string {
	switch {
	case errors.Is(e.Err, unix.EOPNOTSUPP):
		return fmt.Sprintf("%s: driver %s does not support the VF setting %s", e.VF, e.Driver, e.Keys)
	case errors.Is(e.Err, unix.EPROTONOSUPPORT):
		return fmt.Sprintf("%s: driver %s supports only the VLAN protocol 802.1q", e.VF, e.Driver)
	}
	hint := ""
	if errors.Is(e.Err, unix.EINVAL) && strings.Contains(e.Keys, string(MaxRate)) {
		hint = " (rates need the PF's link to be up, and go up to its speed; many drivers have no min_tx_rate)"
	}
	return fmt.Sprintf("%s: driver %s refused %s: %v%s", e.VF, e.Driver, e.Keys, e.Err, hint)
}

func (e *SettingError) Unwrap() error { return e.Err }

// ErrIgnored is matched by the error of a setting that a driver did not make although it reported success.
const ErrIgnored = host.Error("reported success")

// SetPlan is what it takes to set a VF. It comes from [Handle.PlanSet].
type SetPlan struct {
	VF       *iommu.Device
	Want     Settings
	Settings []Setting // none: all is as wanted
	port     *Port
	ran      bool
}

// Steps is the plan in its order.
func (p *SetPlan) Steps() []bind.Action {
	var out []bind.Action
	for _, s := range p.Settings {
		out = append(out, s.action(p.port.Name, p.VF))
	}
	return out
}

// Restores reports whether the plan only brings back what was requested before.
func (p *SetPlan) Restores(requested Settings) bool {
	for _, s := range p.Settings {
		for _, k := range s.Keys {
			if v, wanted := p.Want[k]; wanted && requested[k] != v {
				return false
			}
		}
	}
	return true
}

// PlanSet plans how a VF of a PF gets settings. It refuses what can be told to be wrong beforehand: interrupt vectors
// while the VF has a driver, a MAC address that something else on this host has.
func (s *Handle) PlanSet(pf, vf *iommu.Device, want Settings) (*SetPlan, error) {
	h := s.Host()
	port, err := ReadPort(h, pf)
	if err != nil {
		return nil, err
	}
	owners, err := readOwners(h, []VFWish{{Settings: want}})
	if err != nil {
		return nil, err
	}
	mode, err := modeOf(h, pf)
	if err != nil {
		return nil, err
	}
	p, err := planSet(h, pf, vf, want, port, owners)
	if err != nil {
		return nil, err
	}
	return p, p.possible(pf, mode)
}

// PlanSets plans how VFs of a PF get the settings of their wishes, which are by index, with one look at all. What the
// driver does not report is taken to be as it was last set. A VF that is as wanted has no plan. What a captured host
// does not tell of is an ErrNotCaptured.
func (s *Handle) PlanSets(pf *iommu.Device, vfs []*iommu.Device, wish []VFWish) ([]*SetPlan, error) {
	h := s.Host()
	port, err1 := ReadPort(h, pf)
	owners, err2 := readOwners(h, wish)
	requested, err3 := s.LastRequested(pf)
	mode, err4 := modeOf(h, pf)
	if err := errors.Join(err1, err2, err3, err4, port.tells(wish)); err != nil {
		return nil, err
	}

	var out []*SetPlan
	for _, vf := range vfs {
		if vf.VFIndex >= len(wish) {
			return nil, fmt.Errorf("sriov: %s is vf%d, and the plan has %d VFs", vf.Name, vf.VFIndex, len(wish))
		}
		now, _ := port.Of(vf.VFIndex)
		want := maps.Clone(wish[vf.VFIndex].Settings)
		maps.DeleteFunc(want, func(k Key, v string) bool {
			_, known := now.Settings[k]
			return !known && requested[vf.VFIndex][k] == v
		})
		p, err := planSet(h, pf, vf, want, port, owners)
		if err == nil {
			err = p.possible(pf, mode)
		}
		if err != nil {
			return nil, err
		}
		if len(p.Settings) > 0 {
			out = append(out, p)
		}
	}
	return out, nil
}

func planSet(h *iommu.Host, pf, vf *iommu.Device, want Settings, port *Port, owners owners) (*SetPlan, error) {
	if vf.PhysFn == nil || *vf.PhysFn != pf.Address {
		return nil, &NotVFError{vf.Address}
	}
	want, err := resolved(h, pf, vf, want, port)
	if err != nil {
		return nil, err
	}
	if _, asked := want[MSIX]; asked && vf.Driver != "" {
		return nil, fmt.Errorf("%s is on driver %s: its interrupt vectors can be set only while it has no driver",
			vf.Name,
			vf.Driver)
	}
	if port == nil {
		for k := range want {
			if k.row().file == "" {
				return nil, fmt.Errorf("%w, so viaduct cannot set %s of its VFs", noInterface(h, pf), k)
			}
		}
		port = &Port{PF: pf, host: h}
	}
	if err := owners.unused(want, port, vf); err != nil {
		return nil, err
	}

	now, _ := port.Of(vf.VFIndex)
	return &SetPlan{VF: vf, Want: want, Settings: planSettings(now.Settings, want), port: port}, nil
}

// planNew plans the settings of VFs that are still to be made, while the e-switch is in a mode.
func planNew(h *iommu.Host, pf *iommu.Device, vfs []VFWish, mode string) ([]SetPlan, error) {
	port, err1 := ReadPort(h, pf)
	owners, err2 := readOwners(h, vfs)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}

	var out []SetPlan
	seen := map[string]bool{}
	places, err := iommu.VFAddresses(h, pf.Address)
	if err != nil {
		return nil, err
	}
	for i, a := range places {
		if i == len(vfs) {
			break
		}
		for _, k := range unique {
			value := vfs[i].Settings[k]
			if seen[string(k)+value] {
				return nil, fmt.Errorf("%s=%s is one value for several VFs: use %s=%s to derive one for each", k,
					value, k,
					StableMAC)
			}
			seen[string(k)+value] = isAddress(value) && value != StableMAC
		}

		p, err := planSet(h, pf, vfAt(pf.Address, a, i), vfs[i].Settings, port, owners)
		if err != nil {
			return nil, err
		}
		p.Settings = planSettings(Settings{}, p.Want)
		if err := p.possible(pf, mode); err != nil {
			return nil, err
		}
		out = append(out, *p)
	}
	return out, nil
}

// vfAt is a VF as far as its settings need to know it.
func vfAt(pf, vf iommu.Address, index int) *iommu.Device {
	return &iommu.Device{Name: vf.String(), Address: vf, PCI: true, PhysFn: &pf, VFIndex: index}
}

// resolved checks settings, and puts the addresses that "stable" stands for in its place.
func resolved(h *iommu.Host, pf, vf *iommu.Device, want Settings, port *Port) (Settings, error) {
	want, err := want.checked()
	if err != nil {
		return nil, err
	}
	if want[MAC] == StableMAC {
		mac, err := stableMAC(h, pf, vf, port)
		if err != nil {
			return nil, err
		}
		want[MAC] = mac.String()
	}

	for _, k := range []Key{NodeGUID, PortGUID} {
		if want[k] != StableGUID {
			continue
		}
		guid, err := stableGUID(h, pf, vf)
		if err != nil {
			return nil, err
		}
		want[k] = guid.String()
	}
	return want, nil
}

func stableMAC(h *iommu.Host, pf, vf *iommu.Device, port *Port) (net.HardwareAddr, error) {
	if port == nil || port.Name == "" {
		return nil, fmt.Errorf("%w, so there is no MAC address to derive others from", noInterface(h, pf))
	}
	text, err := port.permanentMAC()
	if err != nil {
		return nil, err
	}
	permanent, err := net.ParseMAC(text)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", port.Name, err)
	}
	if guids, err := iommu.GUIDs(h, pf); err == nil && len(guids) > 0 && len(permanent) != 6 {
		return nil, fmt.Errorf("%s is InfiniBand, and its VFs have no MAC address: give them %s=%s and %s=%s", pf.Name,
			NodeGUID, StableGUID, PortGUID, StableGUID)
	}
	return DeriveMAC(permanent, vf.VFIndex)
}

func stableGUID(h *iommu.Host, pf, vf *iommu.Device) (net.HardwareAddr, error) {
	guids, err := iommu.GUIDs(h, pf)
	if err != nil {
		return nil, err
	}
	infiniband, err := iommu.HasInfiniBand(h, pf)
	if err != nil {
		return nil, err
	}
	if !infiniband || len(guids) == 0 {
		return nil, fmt.Errorf("%s has no InfiniBand GUID to derive others from", pf.Name)
	}
	return DeriveGUID(guids[0], vf.VFIndex)
}

// legacyOnly are, by driver, the settings that it takes only while the PF's e-switch is in mode legacy: in mode
// switchdev rules on the representors do what they do (drivers/net/ethernet/mellanox/mlx5/core/eswitch.c, since Linux
// 5.13; drivers/net/ethernet/intel/ice/ice_sriov.c).
// Each has here what it is then anyway, which nobody has to set.
var legacyOnly = map[string]Settings{
	"mlx5_core": {VLAN: "0", QoS: "0", Proto: dot1q, Trust: off, SpoofChk: off},
	"ice":       {Trust: off},
}

// possible refuses changes that the PF's driver does not make in this mode of its e-switch.
func (p *SetPlan) possible(pf *iommu.Device, mode string) error {
	if mode != switchdev {
		return nil
	}
	var wrong []Key
	for _, k := range Keys() {
		is, only := legacyOnly[pf.Driver][k]
		if only && slices.ContainsFunc(p.Settings, func(s Setting) bool {
			return slices.Contains(s.Keys, k) && p.Want[k] != "" && s.To[k] != is
		}) {
			wrong = append(wrong, k)
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	return fmt.Errorf("driver %s does not support %s for VFs of %s while its e-switch is in mode %s: leave that "+
		"out, and "+
		"make rules on the VFs' representors", pf.Driver, keyNames(wrong), pf.Name, switchdev)
}

// modeOf is the mode of a PF's e-switch, where that decides about settings; "" where it does not, or cannot be asked.
func modeOf(h *iommu.Host, pf *iommu.Device) (string, error) {
	if legacyOnly[pf.Driver] == nil {
		return "", nil
	}
	now, err := ReadEswitch(h, pf.Address)
	if err != nil || now == nil {
		return "", err
	}
	return now.Mode, nil
}

// Unverified is the note for the user on what Set could not read back; none if there is nothing of that.
func Unverified(vf *iommu.Device, keys []Key) []string {
	if len(keys) == 0 {
		return nil
	}
	return []string{
		fmt.Sprintf("%s: set, but not verified, because the driver does not report %s", vf.Name, keyNames(keys)),
	}
}

// opSet is the kind of the record of settings that change.
const opSet = "set"

type setRecord struct {
	VF      iommu.Address `json:"vf"`
	Index   int           `json:"index"`
	Old     Settings      `json:"old"`
	Unknown []Key         `json:"unknown,omitempty"` // what is changed and its driver does not report
}

// Set carries out a plan, for a PF and a VF that are locked: all of it or, undone, nothing. It reads back what came of
// it, and names the keys that the driver takes and does not report. A *SettingError says what the driver refused.
func (s *Handle) Set(ctx context.Context, p *SetPlan) (unverified []Key, err error) {
	if err := s.MayChange(); err != nil {
		return nil, err
	}
	if p == nil || p.port == nil {
		return nil, errors.New("sriov: a SetPlan comes from PlanSet")
	}
	pf := p.port.PF
	for _, d := range []*iommu.Device{pf, p.VF} {
		if !s.Holds(d.Address) {
			return nil, fmt.Errorf("sriov: %s: %w", d.Name, bind.ErrNotLocked)
		}
	}
	if p.ran {
		return nil, fmt.Errorf("sriov: the plan for %s: %w", p.VF.Name, bind.ErrRan)
	}
	p.ran = true
	if len(p.Settings) == 0 {
		return nil, s.rememberRequested(pf, *p)
	}
	r := setRecord{VF: p.VF.Address, Index: p.VF.VFIndex, Old: Settings{}}
	for _, change := range p.Settings {
		maps.Copy(r.Old, change.From)
		if len(change.From) == 0 {
			r.Unknown = append(r.Unknown, change.Keys...)
		}
	}
	if err := s.Begin(opSet, pf, nil, r); err != nil {
		return nil, err
	}

	unverified, err = s.makeOrUndo(ctx, p)
	s.Tell(p.event(err))
	if bind.IsStuck(err) {
		return nil, err
	}
	return unverified, errors.Join(err, s.End(pf.Address))
}

// makeOrUndo makes the settings of a plan, reads them back and remembers them, and undoes those it made when that
// fails.
func (s *Handle) makeOrUndo(ctx context.Context, p *SetPlan) (unverified []Key, err error) {
	port, err := p.port.open()
	if err != nil {
		return nil, err
	}
	defer port.close()

	done, err := s.makeAll(ctx, port, p)
	if bind.IsStuck(err) {
		return nil, err
	}
	if err == nil {
		var now *Port
		if now, err = port.again(); err == nil {
			unverified, err = p.verify(now)
		}
	}
	if err == nil {
		err = s.rememberRequested(p.port.PF, *p)
	}
	if err != nil {
		err = errors.Join(err, s.undoSettings(port, p, p.Settings[:done]))
	}
	return unverified, err
}

// makeAll makes the settings of a plan until one fails, and says how many it made.
func (s *Handle) makeAll(ctx context.Context, port *session, p *SetPlan) (done int, err error) {
	for _, change := range p.Settings {
		if ctx.Err() != nil {
			return done, fmt.Errorf("%s: interrupted before %s", p.VF.Name, keyNames(change.Keys))
		}
		if err := s.makeOne(ctx, port, p.VF, change); err != nil {
			return done, err
		}
		done++
	}
	return done, nil
}

// transient refusals come right after a VF was reset, and end with that.
const (
	retries    = 8
	firstPause = 10 * time.Millisecond // doubled each time: 2.5 s in all
)

// makeOne makes one setting of a VF.
func (s *Handle) makeOne(ctx context.Context, port *session, vf *iommu.Device, change Setting) error {
	refused := func(err error) error {
		if bind.IsStuck(err) {
			return err
		}
		return &SettingError{keyNames(change.Keys), vf.Name, port.PF.Driver, err}
	}
	if r := change.row(); r.file != "" {
		step := bind.Step{Path: attribute(vf.Address, r.file), Value: change.To[r.key]}
		err := s.Write(port.PF.Address, []bind.Step{step})
		if errors.Is(err, unix.ENOENT) {
			err = unix.EOPNOTSUPP
		}
		if err != nil {
			return refused(err)
		}
		return nil
	}

	pause := firstPause
	for try := 1; ; try++ {
		err := port.send(vf.VFIndex, change)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EBUSY) || try == retries {
			return refused(err)
		}
		select {
		case <-time.After(pause):
			pause *= 2
		case <-ctx.Done():
			return refused(err)
		}
	}
}

// send makes one setting by a message. The interface is named by its index: its name may change meanwhile.
func (s *session) send(vf int, change Setting) error {
	r := change.row()
	if r.encode == nil {
		return fmt.Errorf("%s: %w", r.key, unix.EOPNOTSUPP)
	}
	if s.c == nil {
		return unix.ENODEV
	}
	kind, value := r.encode(vf, change)
	return s.c.SetVF(s.index, kind, value)
}

// verify compares with what the port now reports.
func (p *SetPlan) verify(port *Port) (unverified []Key, err error) {
	now, _ := port.Of(p.VF.VFIndex)
	changed := Settings{}
	for _, s := range p.Settings {
		maps.Copy(changed, s.To)
	}
	wrong, unknown := compare(now.Settings, changed)
	if len(wrong) > 0 {
		return nil, fmt.Errorf("%s: driver %s %w, but %s", p.VF.Name, p.port.PF.Driver, ErrIgnored,
			strings.Join(wrong, "; "))
	}
	return unknown, nil
}

// undoSettings sets what was set before, in reverse order. It has no context: that of the command may be over.
func (s *Handle) undoSettings(port *session, p *SetPlan, done []Setting) error {
	var errs []error
	for _, change := range slices.Backward(done) {
		back := Setting{Keys: change.Keys, From: change.To, To: change.From}
		if len(back.To) == 0 {
			errs = append(
				errs,
				fmt.Errorf("%s: %s cannot be put back, because the driver does not report it", p.VF.Name,
					keyNames(change.Keys)),
			)
			continue
		}
		errs = append(errs, s.makeOne(context.Background(), port, p.VF, back))
	}
	return errors.Join(errs...)
}

// setNew gives new VFs of a PF their settings, and says which their driver does not report. On failure its caller
// removes them.
func (s *Handle) setNew(ctx context.Context, pf iommu.Address, vfs []*iommu.Device,
	wish []VFWish) (notes []string, err error) {
	if !anyVF(wish, hasSettings) {
		return nil, nil
	}
	d, port, err := portOf(s.Host(), pf)
	if err != nil {
		return nil, err
	}
	if port == nil {
		port = &Port{PF: d, host: s.Host()}
	}
	open, err := port.open()
	if err != nil {
		return nil, err
	}
	defer open.close()

	var plans []SetPlan
	for i, vf := range vfs {
		if !hasSettings(wish[i]) {
			continue
		}
		want, err := resolved(s.Host(), d, vf, wish[i].Settings, port)
		if err != nil {
			return nil, err
		}
		if vf.Driver != "" {
			// An interrupted run has come as far as that.
			want = maps.Clone(want)
			delete(want, MSIX)
		}
		now, _ := port.Of(vf.VFIndex)
		p := SetPlan{VF: vf, Want: want, Settings: planSettings(now.Settings, want), port: port}
		if _, err := s.makeAll(ctx, open, &p); err != nil {
			return nil, err
		}
		plans = append(plans, p)
		s.Tell(p.part())
	}

	now, err := open.again()
	if err != nil {
		return nil, err
	}
	for _, p := range plans {
		unverified, err := p.verify(now)
		if err != nil {
			return nil, err
		}
		notes = append(notes, Unverified(p.VF, unverified)...)
	}
	return notes, s.rememberRequested(d, plans...)
}

// recoverSet puts a VF's settings back as they were, as far as that is known.
func recoverSet(ctx context.Context, b *bind.Handle, pf iommu.Address, data json.RawMessage) (string, error) {
	s := wrap(b)
	var r setRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return "has a record that cannot be read", err
	}
	_, port, err := portOf(s.Host(), pf)
	if err != nil {
		return "cannot be read", err
	}
	if port == nil {
		return "no longer has an interface", nil
	}
	now, known := port.Of(r.Index)
	if !known {
		return fmt.Sprintf("no longer has vf%d, whose change of settings was interrupted", r.Index), nil
	}

	open, err := port.open()
	if err != nil {
		return "is not done", err
	}
	defer open.close()
	for _, change := range planSettings(now.Settings, r.Old) {
		err := s.makeOne(ctx, open, vfAt(pf, r.VF, r.Index), change)
		if bind.IsStuck(err) {
			return "is not done", err
		}
		if err != nil {
			// Told once: a record that stays would keep the PF from all further changes.
			return "is not done", errors.Join(err, s.End(pf))
		}
	}
	but := ""
	if len(r.Unknown) > 0 {
		but = fmt.Sprintf(", except %s, which its driver does not report and which may be new", keyNames(r.Unknown))
	}
	return fmt.Sprintf("has the old settings of vf%d%s: their change was interrupted", r.Index, but), nil
}
