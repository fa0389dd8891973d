package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"viaduct/cmd/internal/vmm"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// version reads the version of a QEMU.
func (m *machine) version() (string, error) {
	var v struct {
		QEMU struct{ Major, Minor, Micro int }
	}
	err := m.do("query-version", nil, &v)
	return fmt.Sprintf("%d.%d.%d", v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro), err
}

// askQEMU asks a QEMU what it has.
func askQEMU(m *machine) (*QEMU, error) {
	q := &QEMU{}
	var err1 error
	q.Version, err1 = m.version()
	var machines []struct{ Name, Alias string }
	err2 := m.do("query-machines", nil, &machines)
	for _, k := range machines {
		if q.Machines = append(q.Machines, k.Name); k.Alias != "" {
			q.Machines = append(q.Machines, k.Alias)
		}
	}
	return q, errors.Join(err1, err2)
}

// AskGuest asks the QEMU of a guest that runs; nil if it has no socket of viaduct's, or does not answer.
func AskGuest(ctx context.Context, vm *vmm.Machine) (*VMState, error) {
	if vm == nil || vm.Socket == "" {
		return nil, nil
	}
	m, err := dial(ctx, vm.Socket)
	if err != nil || m == nil {
		return nil, err
	}
	defer func() { _ = m.Close() }()
	return m.asked(vm)
}

func (m *machine) asked(vm *vmm.Machine) (*VMState, error) {
	a := &VMState{}
	var err1, err2, err3 error
	a.Version, err1 = m.version()
	status, p, err2 := m.look()
	a.Status, a.Blocked = status, p.Blocked
	if copied(p.Status) == Underway {
		a.Migration = "active"
	}

	var kind string
	if m.do("qom-get", map[string]string{"path": "/machine", "property": "type"}, &kind) == nil {
		a.Machine = strings.TrimSuffix(kind, "-machine")
	}

	if vm.Standby != "" {
		paired, err := m.has(vmm.StandbyID)
		if err == nil && paired {
			var has bool
			has, err = m.has(vmm.PrimaryID)
			a.Primary = &has
		}
		err3 = err
	} else {
		var has bool
		has, err3 = m.has(vmm.PrimaryID)
		a.Pluggable = has
	}

	var jobs []struct{ Status string }
	if m.do("query-jobs", nil, &jobs) == nil {
		for _, j := range jobs {
			if j.Status != "concluded" && j.Status != "null" {
				a.Jobs++
			}
		}
	}

	var blocks []struct {
		Inserted *struct{ File string }
	}

	err4 := m.do("query-block", nil, &blocks)
	for _, b := range blocks {
		if b.Inserted != nil && strings.HasPrefix(b.Inserted.File, "/") {
			a.Disks = append(a.Disks, Disk{Path: b.Inserted.File})
		}
	}

	return a, errors.Join(err1, err2, err3, err4)
}

// ProcessOf is the process that answers at a QEMU's socket.
func ProcessOf(ctx context.Context, h *iommu.Host, socket string) (holder.Proc, error) {
	m, err := dial(ctx, socket)
	if err != nil {
		return holder.Proc{}, err
	}
	if m == nil {
		return holder.Proc{}, fmt.Errorf("nobody answers at %s: the guest does not run, or was not started with it",
			socket)
	}
	defer func() { _ = m.Close() }()
	if m.PID == 0 {
		return holder.Proc{}, fmt.Errorf("nobody tells which process answers at %s", socket)
	}
	return holder.NameProcess(h, m.PID), nil
}

// AskHost asks the viaduct of another host for its facts, and completes what is known of the guest by them. Name is
// what
// the user calls the host.
func AskHost(ctx context.Context, r Remote, g *Guest, name string) (*Facts, error) {
	p, err := r.Connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer p.Close()
	w := &FactsWish{Program: "qemu-system-x86_64"}
	if g.VM != nil {
		w.VM = *g.VM
	}

	if g.State != nil {
		w.VM.Machine = cmp.Or(g.State.Machine, w.VM.Machine)
		for _, d := range g.State.Disks {
			w.Disks = append(w.Disks, d.Path)
		}
	}

	var a FactsAnswer
	if _, err := p.Ask(ctx, &Question{Do: askFacts}, w, &a); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if a.Facts == nil {
		return nil, fmt.Errorf("%s: the other side told nothing of its host", name)
	}

	if g.State != nil {
		for i, d := range g.State.Disks {
			if there, known := a.Disks[d.Path]; known {
				g.State.Disks[i].There = &there
			}
		}
	}

	a.Facts.Host = name
	a.Facts.Live = true
	return a.Facts, nil
}
