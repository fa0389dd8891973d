package sriov

import (
	"errors"
	"path"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// Ports are the interfaces of an e-switch.
type Ports struct {
	Uplinks []string       // what stands for the wires
	VFs     map[int]string // representors, by VF
}

// noPort reports whether an error of reading phys_switch_id says that there is none.
func noPort(err error) bool { return host.Absent(err) || errors.Is(err, unix.EOPNOTSUPP) }

// ReadPorts finds the interfaces of the e-switch of a PF's interface: they have its switch id, and say in their port
// name whom they stand for (p0 a wire; pf0vf1 a VF, behind c1 one of another host; net/devlink/port.c). The number of
// the PF there is that of the function with some drivers, and of the port with others (mlx5); an interface whose device
// is a PF tells whose it is.
func ReadPorts(h *iommu.Host, port *Port) (Ports, error) {
	out := Ports{VFs: map[int]string{}}
	if port == nil || port.SwitchID == "" {
		return out, nil
	}
	names, err := h.Names(netClass)
	if err != nil {
		return out, err
	}

	for _, n := range names {
		id, err1 := h.String(path.Join(netClass, n, "phys_switch_id"))
		name, err2 := iommu.ReadPortName(h, n)
		if noPort(err1) || errors.Is(err1, unix.ENOTDIR) {
			// Gone, or no port of a switch.
			continue
		}
		if err := errors.Join(err1, err2); err != nil {
			return out, err
		}
		if id != port.SwitchID {
			continue
		}
		if name.Wire {
			out.Uplinks = append(out.Uplinks, n)
		}
		if name.VF == nil {
			continue
		}
		own, err := ofPF(h, n, port.PF.Address, name.PF)
		if err != nil {
			return out, err
		}
		if own {
			out.VFs[*name.VF] = n
		}
	}
	return out, nil
}

// ofPF reports whether a representor stands for a VF of a PF, whose number in its name this is.
func ofPF(h *iommu.Host, name string, pf iommu.Address, number int) (bool, error) {
	device, err := h.LinkBase(path.Join(netClass, name, "device"))
	if err != nil && !host.Absent(err) {
		return false, err
	}
	if a, bad := iommu.ParseAddress(device); err == nil && bad == nil {
		return a == pf, nil
	}
	return number == int(pf.Function), nil
}
