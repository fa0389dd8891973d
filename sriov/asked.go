package sriov

import (
	"maps"
	"strings"

	"viaduct/iommu"
)

// asked is what was last set of a PF's VFs, by index, kept until the VFs go or the host is booted, so that it can be
// set again after the PF was reset.
type asked struct {
	PF  iommu.ID         `json:"pf"`
	VFs map[int]Settings `json:"vfs"`
}

// askedKey names a PF's record, by the PF's place: its address may change within a boot, its place not.
func askedKey(h *iommu.Host, pf *iommu.Device) (string, error) {
	place, err := iommu.PathOf(h, pf)
	return "asked-" + strings.ReplaceAll(place, "/", "_"), err
}

// LastRequested returns the settings last requested for each VF of a PF, by the VF's index. It is the caller's to
// change.
func (s *Handle) LastRequested(pf *iommu.Device) (map[int]Settings, error) {
	key, err := askedKey(s.Host(), pf)
	if err != nil {
		return nil, err
	}
	var a asked
	known, err := s.journal.Get(key, &a)
	if err != nil {
		return nil, err
	}
	if !known || a.PF != pf.ID || a.VFs == nil {
		return map[int]Settings{}, nil
	}
	return a.VFs, nil
}

// rememberRequested writes down what was set now, beside what was before.
func (s *Handle) rememberRequested(pf *iommu.Device, plans ...SetPlan) error {
	all, err := s.LastRequested(pf)
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
	key, err := askedKey(s.Host(), pf)
	if err != nil {
		return err
	}
	return s.journal.Put(key, asked{pf.ID, all})
}

// forgetRequested is for VFs that are no more.
func (s *Handle) forgetRequested(pf *iommu.Device) error {
	key, err := askedKey(s.Host(), pf)
	if err != nil {
		return err
	}
	return s.journal.Delete(key)
}
