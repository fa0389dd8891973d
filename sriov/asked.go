package sriov

import (
	"maps"
	"strings"

	"viaduct/iommu"
	"viaduct/vfio"
)

// asked is what was last set of a PF's VFs, by index, kept until the VFs go or the host is booted, so that it can be set again
// after the PF was reset.
type asked struct {
	PF  iommu.ID         `json:"pf"`
	VFs map[int]Settings `json:"vfs"`
}

// askedKey names a PF's record, by the PF's place: its address may change within a boot, its place not.
func askedKey(h *iommu.Host, pf *iommu.Device) (string, error) {
	place, err := iommu.PathOf(h, pf)
	return "asked-" + strings.ReplaceAll(place, "/", "_"), err
}

// Asked are the settings that were last asked for, by VF, of a PF's VFs.
func Asked(b *vfio.Binder, pf *iommu.Device) (map[int]Settings, error) {
	key, err := askedKey(b.Host, pf)
	if err != nil {
		return nil, err
	}
	var a asked
	if known, err := b.Journal.Get(key, &a); err != nil || !known || a.PF != pf.ID {
		return map[int]Settings{}, err
	}
	return a.VFs, nil
}

// remember writes down what was set now, beside what was before.
func remember(b *vfio.Binder, pf *iommu.Device, plans ...SetPlan) error {
	all, err := Asked(b, pf)
	if err != nil {
		return err
	}
	for _, p := range plans {
		vf := all[p.VF.VFIndex]
		if vf == nil {
			vf = Settings{}
		}
		maps.Copy(vf, p.Want)
		all[p.VF.VFIndex] = vf
	}
	key, err := askedKey(b.Host, pf)
	if err != nil {
		return err
	}
	return b.Journal.Put(key, asked{pf.ID, all})
}

// forgetAsked is for VFs that are no more.
func forgetAsked(b *vfio.Binder, pf *iommu.Device) error {
	key, err := askedKey(b.Host, pf)
	if err != nil {
		return err
	}
	return b.Journal.Delete(key)
}
