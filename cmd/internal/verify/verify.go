package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"viaduct/iommu"
	"viaduct/vfio"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Options are what is verified beside the device.
type Options struct {
	Memory uint64 // of a guest, in bytes; 0: none is checked
}

// verification is one run.
type verification struct {
	host     *iommu.Host
	topology *iommu.Topology
	device   *iommu.Device
	report   *Report
	samples  []*vfio.Memory // what is mapped to take the time
}

// Run opens a device by each way that the host has, and says what came of it. The device is on a vfio driver, locked,
// and used by nobody. Opening resets it. An error is one of looking: what is wrong with the device is in the report.
func Run(ctx context.Context, h *iommu.Host, t *iommu.Topology, d *iommu.Device, o Options) (report *Report,
	err error) {
	v := &verification{host: h, topology: t, device: d, report: &Report{
		Address: d.Address, Driver: &d.Driver, Reasons: []string{}, Notes: []string{}, Ways: map[vfio.Way]*Way{},
	}}
	defer func() {
		for _, m := range v.samples {
			err = errors.Join(err, m.Close())
		}
	}()
	ways, err := vfio.Ways(h, d)
	if err != nil {
		return nil, err
	}
	first := true
	for _, way := range []vfio.Way{vfio.IOMMUFD, vfio.Container} {
		w := &Way{Exists: slices.Contains(ways, way)}
		v.report.Ways[way] = w
		if !w.Exists {
			w.fail(missingWay(way))
			continue
		}
		w.fail(v.try(ctx, way, w, &first))
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}

	if err := v.inUse(ways); err != nil {
		return nil, err
	}
	if err := v.judgeWays(ways); err != nil {
		return nil, err
	}
	if o.Memory != 0 {
		v.memory(o.Memory)
	}
	v.report.Usable = len(v.report.Reasons) == 0
	return v.report, nil
}

func (w *Way) fail(err error) {
	w.OK, w.err = err == nil, err
	if err != nil {
		w.Error = new(oneLine(err))
	}
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

func missingWay(way vfio.Way) error {
	if way == vfio.IOMMUFD {
		return errors.New("this kernel has no iommufd with nodes of devices (CONFIG_IOMMUFD, CONFIG_VFIO_DEVICE_CDEV)")
	}
	return errors.New("this kernel made no node for the device's group (CONFIG_VFIO_GROUP)")
}

// try opens the device by one way. The first way that opens it tells of the device itself.
func (v *verification) try(ctx context.Context, way vfio.Way, w *Way, first *bool) (err error) {
	c, err := vfio.NewContext(v.host, vfio.Options{Way: way})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	d, err := c.Open(v.device.Address.String())
	if err != nil {
		return err
	}
	if *first {
		if err := v.describe(d); err != nil {
			return err
		}
		if err := v.allocate(); err != nil {
			return err
		}
		*first = false
	}
	if err := v.alive(d); err != nil {
		return err
	}

	if err := w.describe(c, d); err != nil {
		return err
	}
	if way == vfio.IOMMUFD {
		v.hardware(w, d)
	}
	if err := w.measure(c, v.samples); err != nil {
		return err
	}
	if err := w.interrupt(ctx, d); err != nil {
		return err
	}
	return v.reset(d)
}

// describe tells of regions, interrupts and abilities.
func (v *verification) describe(d *vfio.Device) error {
	info := d.Info()
	v.report.Regions, v.report.Interrupts = []Region{}, []Interrupts{}
	for i := range info.Regions {
		r, err := d.Region(i)
		if errors.Is(err, vfio.ErrUnsupported) || err == nil && r.Size == 0 {
			continue
		}
		if err != nil {
			return err
		}
		region := Region{Name: regionName(i), Size: r.Size, Read: r.Read, Write: r.Write}
		for _, a := range r.Mappable {
			region.Mappable += a.Size
		}
		v.report.Regions = append(v.report.Regions, region)
	}
	for k := range vfio.Kind(info.Interrupts) {
		i, err := d.InterruptInfo(k)
		if err != nil {
			return err
		}
		if i.Count > 0 {
			v.report.Interrupts = append(v.report.Interrupts, Interrupts{k.String(), i.Count, i.Maskable, i.Fixed})
		}
	}

	if err := v.describeReset(d, info); err != nil {
		return err
	}
	return v.describeMigration(d)
}

func regionName(i int) string {
	switch {
	case i >= vfio.BAR0 && i < vfio.ROM:
		return fmt.Sprintf("BAR %d", i)
	case i == vfio.ROM:
		return "ROM"
	case i == vfio.Config:
		return "config"
	case i == vfio.VGA:
		return "VGA"
	}
	return fmt.Sprintf("region %d", i)
}

func (v *verification) describeReset(d *vfio.Device, info vfio.DeviceInfo) error {
	reset := &v.report.Reset
	methods, err := d.ResetMethods()
	if err != nil {
		return err
	}
	reset.Methods, reset.ByItself = methods, &info.Reset
	together, err := d.HotResetInfo()
	switch {
	case err == nil:
		reset.Together = []string{}
		for _, t := range together {
			reset.Together = append(reset.Together, t.Address.String())
		}
	case !errors.Is(err, vfio.ErrUnsupported) && !errors.Is(err, vfio.ErrNotOwned):
		return err
	}
	switch {
	case info.Reset:
	case len(reset.Together) > 1:
		v.note("it can be reset only together with everything on its bus; a release does that if the guest has " +
			"all of it")
	default:
		v.note("it cannot be reset: a guest gets it as the last one left it")
	}
	return nil
}

func (v *verification) describeMigration(d *vfio.Device) error {
	m, err := d.Migration()
	switch {
	case errors.Is(err, vfio.ErrUnsupported):
		v.report.Migration = Migration{OK: new(false), Reason: new(
			v.device.Driver + " cannot save the state of this device: that needs a variant driver")}
	case err != nil:
		return err
	default:
		v.report.Migration = Migration{OK: &m.StopCopy, P2P: &m.P2P, PreCopy: &m.PreCopy}
		if size, err := d.DataSize(); err == nil {
			v.report.Migration.DataSize = &size
		}
	}

	can, err := d.CanLog()
	if err != nil {
		return err
	}
	v.report.DirtyTracking.Device.OK = &can
	if !can {
		v.report.DirtyTracking.Device.Reason = new(v.device.Driver + " does not record what the device writes to")
	}
	v.report.DirtyTracking.IOMMU.Reason = new("only iommufd reports it")
	return nil
}

// alive reads the device's ids, which a device that is gone has all ones in.
func (v *verification) alive(d *vfio.Device) error {
	config, err := d.Region(vfio.Config)
	if err != nil {
		return err
	}
	ids := make([]byte, 4)
	if _, err := config.ReadAt(ids, 0); err != nil {
		return err
	}
	if bytes.Equal(ids, []byte{0xff, 0xff, 0xff, 0xff}) {
		return fmt.Errorf("its configuration space reads as all ones: %w", vfio.ErrFault)
	}
	return nil
}

// describe tells what the IOMMU can map.
func (w *Way) describe(c *vfio.Context, d *vfio.Device) error {
	info, err := c.Info()
	if err != nil {
		return err
	}
	if info.PageSizes != nil {
		w.PageSizes = []uint64{}
		for bit := range 64 {
			if size := uint64(1) << bit; *info.PageSizes&size != 0 {
				w.PageSizes = append(w.PageSizes, size)
			}
		}
	}
	w.Alignment, w.MappingsLeft = &info.Alignment, info.Left
	if w.ranges = info.Ranges; info.Ranges == nil {
		// A kernel before 5.4 does not tell.
		return nil
	}
	w.AddressWidth = new(info.Width())
	w.IOVARanges, w.Reserved = spans(info.Ranges), spans(info.Reserved())
	return nil
}

// hardware tells what iommufd says of the IOMMU.
func (v *verification) hardware(w *Way, d *vfio.Device) {
	ability := &v.report.DirtyTracking.IOMMU
	hw, err := d.Hardware()
	if err != nil {
		ability.Reason = new(oneLine(err))
		return
	}
	switch {
	case hw.AMD != nil:
		w.IOMMU = new("amd-vi")
	case hw.VTd != nil:
		w.IOMMU = new("vt-d")
	case hw.SMMU != nil:
		w.IOMMU = new("smmu-v3")
	}
	ability.OK, ability.Reason = &hw.DirtyTracking, nil
	if !hw.DirtyTracking {
		ability.Reason = new("the IOMMU, or its driver in this kernel, cannot record what is written to")
	}
}

// interrupt enables a vector, and has the kernel signal it.
func (w *Way) interrupt(ctx context.Context, d *vfio.Device) error {
	for _, kind := range []vfio.Kind{vfio.MSIX, vfio.MSI, vfio.INTx} {
		info, err := d.InterruptInfo(kind)
		if errors.Is(err, vfio.ErrUnsupported) || err == nil && info.Count == 0 {
			continue
		}
		if err != nil {
			return err
		}
		w.Interrupt = new(false)
		if err := signal(ctx, d, kind); err != nil {
			return err
		}
		*w.Interrupt = true
		return nil
	}
	return nil
}

func signal(ctx context.Context, d *vfio.Device, kind vfio.Kind) (err error) {
	vectors, err := d.Interrupts(kind, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vectors.Close()) }()
	if err := vectors.Trigger(0); err != nil {
		return err
	}
	const patience = 5 * time.Second
	waiting, stop := context.WithTimeout(ctx, patience)
	defer stop()
	if _, err := vectors.Wait(waiting, 0); err != nil {
		return fmt.Errorf("an interrupt (%s) that was triggered did not arrive in %s: %w", kind, patience, err)
	}
	return nil
}

// reset resets the device, if it can be reset alone.
func (v *verification) reset(d *vfio.Device) error {
	reset := &v.report.Reset
	if !d.Info().Reset || reset.Worked != nil {
		return nil
	}
	err := d.Reset()
	if err == nil {
		// One that falls off the bus resets without an error.
		err = v.alive(d)
	}
	reset.Worked = new(err == nil)
	if err != nil {
		reset.Error = new(oneLine(err))
		v.reason("it cannot be reset, although it says it can: %s", oneLine(err))
	}
	return nil
}

// inUse refuses a device that only the kernel knows somebody to have.
func (v *verification) inUse(ways []vfio.Way) error {
	for _, way := range ways {
		if w := v.report.Ways[way]; errors.Is(w.err, vfio.ErrInUse) {
			why := holder.Reason{
				Kind: holder.ReasonKind(holder.Process), Device: v.device.Name, Text: oneLine(w.err), Err: w.err,
			}
			return holder.Because("open "+v.device.Name, why,
				"verify it when nobody has it; the kernel does not say who has it")
		}
	}
	return nil
}

// judgeWays says what follows from the ways that work and those that do not: one is enough.
func (v *verification) judgeWays(ways []vfio.Way) error {
	works := slices.ContainsFunc(ways, func(w vfio.Way) bool { return v.report.Ways[w].OK })
	if note := bind.InterruptNote(v.topology); note != "" && !works {
		v.reason("%s: %s", note, iommu.WhyNotRemapped(v.host, v.topology))
	}
	for _, way := range ways {
		w := v.report.Ways[way]
		switch {
		case w.OK:
		case works:
			v.note("%s does not work: %s", way, *w.Error)
		default:
			// Often it is the same for both.
			if text := *w.Error; !slices.Contains(v.report.Reasons, text) {
				v.report.Reasons = append(v.report.Reasons, text)
			}
		}
	}
	if len(ways) > 0 {
		return nil
	}
	unsafe, err := vfio.NoIOMMU(v.host)
	if unsafe {
		v.reason("there is no IOMMU in front of it: VFIO has it in its noiommu mode, in which it reaches all of the " +
			"host's memory")
	} else {
		v.reason("VFIO made no node for it")
	}
	return err
}

func (v *verification) note(format string, a ...any) {
	v.report.Notes = append(v.report.Notes, fmt.Sprintf(format, a...))
}

func (v *verification) reason(format string, a ...any) {
	v.report.Reasons = append(v.report.Reasons, fmt.Sprintf(format, a...))
}

func hex(n uint64) string { return fmt.Sprintf("%#x", n) }

// NotTaken is the report on a device that no vfio driver has.
func NotTaken(d *iommu.Device, reason string) *Report {
	r := &Report{Address: d.Address, Reasons: []string{reason}, Notes: []string{}, Ways: map[vfio.Way]*Way{}}
	if d.Driver != "" {
		r.Driver = &d.Driver
	}
	for _, way := range []vfio.Way{vfio.IOMMUFD, vfio.Container} {
		r.Ways[way] = &Way{Error: new("it is not on a vfio driver")}
	}
	return r
}
