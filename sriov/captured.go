package sriov

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// ErrNotCaptured is matched by errors that say that a captured host does not tell what its VFs have: an older snapshot,
// one that an ordinary user made, or a plain copy of /sys.
const ErrNotCaptured = host.Error("the settings of its VFs were not captured")

// capturedPF is what a snapshot has of a PF beside its files, in a file of its own. What is nil was not to be had.
type capturedPF struct {
	Port    *capturedPort   `json:"port"`
	Eswitch *[]Eswitch      `json:"eswitch"` // one, or none where there is none
	Offload map[string]bool `json:"offload"` // hw-tc-offload by interface
}

type capturedPort struct {
	Name     string       `json:"name"`
	SwitchID string       `json:"switch_id,omitempty"`
	VFs      []capturedVF `json:"vfs"`
}

type capturedVF struct {
	Index    int      `json:"index"`
	Settings Settings `json:"settings"`
	Stats    *Stats   `json:"statistics,omitempty"`
}

func factOf(pf iommu.Address) string { return "sriov/" + pf.String() + ".json" }

// Capture asks for what the PFs of a running host have and give their VFs, for a snapshot: [ReadPort], [ReadEswitch]
// and plans read it back. What could not be asked for is told by an error, beside which the facts are of use.
func Capture(h *iommu.Host, t *iommu.Topology) ([]iommu.Fact, error) {
	var out []iommu.Fact
	var errs []error
	t.All(func(pf *iommu.Device) bool {
		if pf.SRIOV == nil {
			return true
		}
		c, err := askAll(h, pf)
		b, failed := json.Marshal(c)
		if err = errors.Join(err, failed); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", pf.Name, err))
		}
		out = append(out, iommu.Fact{Name: factOf(pf.Address), Data: b})
		return true
	})
	return out, errors.Join(errs...)
}

// askAll asks for all that a snapshot has of a PF.
func askAll(h *iommu.Host, pf *iommu.Device) (capturedPF, error) {
	var c capturedPF
	port, err1 := ReadPort(h, pf)
	if port != nil && err1 == nil {
		c.Port = &capturedPort{Name: port.Name, SwitchID: port.SwitchID, VFs: []capturedVF{}}
		for _, vf := range port.VFs {
			c.Port.VFs = append(c.Port.VFs, capturedVF(vf))
		}
	}

	eswitch, err2 := ReadEswitch(h, pf.Address)
	if err2 == nil {
		c.Eswitch = &[]Eswitch{}
		if eswitch != nil {
			*c.Eswitch = append(*c.Eswitch, *eswitch)
		}
	}

	for _, n := range pf.Netdevs {
		if f, err := readTCOffload(h, n); err == nil {
			if c.Offload == nil {
				c.Offload = map[string]bool{}
			}
			c.Offload[n] = f.on
		}
	}
	return c, errors.Join(err1, err2)
}

// readCaptured is what a captured host has of a PF; of one that does not tell, all of it is nil.
func readCaptured(h *iommu.Host, pf iommu.Address) (*capturedPF, error) {
	b, known, err := h.Fact(factOf(pf))
	if err != nil || !known {
		return &capturedPF{}, err
	}
	c, err := decodeCaptured(b)
	if err != nil {
		return nil, fmt.Errorf("what a snapshot has of %s: %w", pf, err)
	}
	return c, nil
}

// decodeCaptured reads that file, which anybody may have written. Settings of a later viaduct are left out.
func decodeCaptured(b []byte) (*capturedPF, error) {
	// A VF has a routing id of 16 bits. A GUID is the longest value.
	const maxVFs, maxValue = 1 << 16, 64
	c := &capturedPF{}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, err
	}
	if c.Eswitch != nil && len(*c.Eswitch) > 1 {
		return nil, errors.New("it has several e-switches")
	}
	if c.Port == nil {
		return c, nil
	}

	seen := map[int]bool{}
	for i := range c.Port.VFs {
		vf := &c.Port.VFs[i]
		if vf.Index < 0 || vf.Index >= maxVFs || seen[vf.Index] {
			return nil, fmt.Errorf("it has no vf%d, or several", vf.Index)
		}
		seen[vf.Index] = true
		known := Settings{}
		for _, k := range Keys() {
			value, has := vf.Settings[k]
			if len(value) > maxValue {
				return nil, fmt.Errorf("the %s of vf%d has %d bytes", k, vf.Index, len(value))
			}
			if has {
				known[k] = value
			}
		}
		vf.Settings = known
	}
	return c, nil
}

// capturedPortOf is a captured PF's port. It must be one of the PF's interfaces.
func capturedPortOf(h *iommu.Host, pf *iommu.Device, own []string) (*Port, error) {
	c, err := readCaptured(h, pf.Address)
	if err != nil {
		return nil, err
	}
	if c.Port == nil {
		return &Port{PF: pf, Name: own[0], host: h}, nil
	}
	if !slices.Contains(own, c.Port.Name) {
		return nil, fmt.Errorf("what a snapshot has of %s is of interface %q, which is not its own", pf.Name,
			c.Port.Name)
	}
	port := &Port{PF: pf, Name: c.Port.Name, SwitchID: c.Port.SwitchID, Known: true, host: h}
	for _, vf := range c.Port.VFs {
		port.VFs = append(port.VFs, VFInfo(vf))
	}
	return port, nil
}

// tells is an ErrNotCaptured for settings that nobody can compare with what the VFs have.
func (p *Port) tells(wish []VFWish) error {
	if p == nil || p.Known || !anyVF(wish, hasSettings) {
		return nil
	}
	return fmt.Errorf("%s: %w", p.PF.Name, ErrNotCaptured)
}

// readEswitchOf asks for a PF's e-switch; nil if it has none. It is not known where a captured host does not tell.
func readEswitchOf(h *iommu.Host, pf iommu.Address) (e *Eswitch, known bool, err error) {
	if h.Live() {
		e, err = readEswitch(h, "pci", pf.String())
		return e, err == nil, err
	}
	c, err := readCaptured(h, pf)
	if err != nil || c.Eswitch == nil {
		return nil, false, err
	}
	if len(*c.Eswitch) > 0 {
		e = &(*c.Eswitch)[0]
	}
	return e, true, nil
}

// capturedOffloadsBut is offloadsBut for a captured host. Whether a driver lets it be changed is not known of that.
func capturedOffloadsBut(h *iommu.Host, pf *iommu.Device, want bool) ([]Offload, error) {
	c, err := readCaptured(h, pf.Address)
	if err != nil {
		return nil, err
	}
	var out []Offload
	for _, n := range pf.Netdevs {
		now, known := c.Offload[n]
		if !known {
			return nil, fmt.Errorf("interface %s: %s was not captured: %w", n, tcFeature, fs.ErrNotExist)
		}
		if now != want {
			out = append(out, Offload{n, want})
		}
	}
	return out, nil
}
