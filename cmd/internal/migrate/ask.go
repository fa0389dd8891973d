package migrate

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"viaduct/cmd/internal/vmm"
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
func AskGuest(ctx context.Context, vm *vmm.Machine) (*Asked, error) {
	if vm == nil || vm.Socket == "" {
		return nil, nil
	}
	m, err := dial(ctx, vm.Socket)
	if err != nil || m == nil {
		return nil, err
	}
	defer m.Close()
	return m.asked(vm)
}

func (m *machine) asked(vm *vmm.Machine) (*Asked, error) {
	a := &Asked{}
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
