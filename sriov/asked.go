package sriov

import (
	"errors"
	"maps"
	"strconv"
	"strings"

	"viaduct/iommu"
	"viaduct/vfio"
)

// asked is what was last set of a VF, kept until the VFs go or the host is booted, so that it can be set again after the PF
// was reset.
type asked struct {
	PF       iommu.ID `json:"pf"`
	Index    int      `json:"index"`
	Settings Settings `json:"settings"`
}

// askedPrefix names the records of a PF's VFs, by the PF's place: its address may change within a boot, its place not.
func askedPrefix(h *iommu.Host, pf *iommu.Device) (string, error) {
	place, err := iommu.PathOf(h, pf)
	return "asked-" + strings.ReplaceAll(place, "/", "_") + "-", err
}

func remember(b *vfio.Binder, p *SetPlan) error {
	prefix, err := askedPrefix(b.Host, p.port.PF)
	if err != nil {
		return err
	}
	key := prefix + strconv.Itoa(p.VF.VFIndex)
	var a asked
	if known, err := b.Journal.Get(key, &a); err != nil || !known || a.PF != p.port.PF.ID {
		a = asked{PF: p.port.PF.ID, Index: p.VF.VFIndex, Settings: Settings{}}
	}
	maps.Copy(a.Settings, p.Want)
	return b.Journal.Put(key, a)
}

// Asked are the settings that were last asked for, by VF, of a PF's VFs.
func Asked(b *vfio.Binder, pf *iommu.Device) (map[int]Settings, error) {
	prefix, err := askedPrefix(b.Host, pf)
	if err != nil {
		return nil, err
	}
	keys, err := b.Journal.Keys(prefix)
	out := map[int]Settings{}
	for _, k := range keys {
		var a asked
		if _, err := b.Journal.Get(k, &a); err != nil {
			return nil, err
		}
		if a.PF == pf.ID {
			out[a.Index] = a.Settings
		}
	}
	return out, err
}

// forgetAsked is for VFs that are no more.
func forgetAsked(b *vfio.Binder, pf *iommu.Device) error {
	prefix, err := askedPrefix(b.Host, pf)
	if err != nil {
		return err
	}
	keys, err := b.Journal.Keys(prefix)
	for _, k := range keys {
		err = errors.Join(err, b.Journal.Delete(k))
	}
	return err
}
