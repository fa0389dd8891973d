package main

import (
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/lease"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio"
)

// leaseView is one lease in JSON.
type leaseView struct {
	Guest   string            `json:"guest"`
	For     *string           `json:"for"`
	State   lease.State       `json:"state"`
	Why     *string           `json:"why"`
	From    string            `json:"from"`
	Sources []lease.Source    `json:"sources"`
	Made    time.Time         `json:"made"`
	TTL     *float64          `json:"ttl_seconds"`
	Persist bool              `json:"persist"`
	Unit    *string           `json:"unit"`
	Owner   *int              `json:"owner_pid"`
	Holders []string          `json:"holders"`
	Devices []leaseDeviceView `json:"devices"`
}

type leaseDeviceView struct {
	Address  string         `json:"address"`
	Group    *int           `json:"group"`
	Nodes    []string       `json:"nodes"`
	PF       *string        `json:"physfn"`
	Index    *int           `json:"vf_index"`
	MAC      *string        `json:"mac"`
	VLAN     *string        `json:"vlan"`
	Settings sriov.Settings `json:"settings"`
}

func viewLease(m *lease.Manager, look lease.Look) leaseView {
	l := look.Lease
	v := leaseView{Guest: l.Guest, For: known(l.For), State: look.State, Why: known(look.Why), From: l.DrawnFrom(),
		Sources: l.Sources, Made: l.Made, Persist: l.Persist, Unit: known(l.Unit), Holders: []string{},
		Devices: []leaseDeviceView{}}
	if l.TTL > 0 && !l.Persist {
		seconds := l.TTL.Seconds()
		v.TTL = &seconds
	}

	if l.Owner != nil {
		v.Owner = &l.Owner.PID
	}

	if len(look.Now) > 0 {
		for _, h := range look.Now {
			v.Holders = append(v.Holders, h.String())
		}
	} else if look.State == lease.Active {
		for _, h := range l.Holders {
			v.Holders = append(v.Holders, h.Name)
		}
	}

	for _, of := range l.Devices {
		d := leaseDeviceView{Address: of.Address.String(), Nodes: []string{}, Settings: sriov.Settings{}}
		if of.Now != nil {
			d.Settings = of.Now
		}
		if found, err := m.Topology.Find(of.Address); err == nil && found.ID == of.ID {
			d.Group = found.Group
			if nodes, err := vfio.Nodes(m.Host(), found); err == nil {
				d.Nodes = append(d.Nodes, nodes...) // none before it is taken
			} else {
				d.Nodes = nil
			}
			if found.PhysFn != nil {
				pf := found.PhysFn.String()
				d.PF, d.Index = &pf, &found.VFIndex
			}
		}
		d.MAC, d.VLAN = known(of.Now[sriov.MAC]), known(of.Now[sriov.VLAN])
		v.Devices = append(v.Devices, d)
	}

	return v
}

func leasesCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:  "leases",
		Usage: "list what is assigned to guests, and what is in quarantine",
		Description: "A lease is making (viaduct is working on it), reserved (no process has its devices open yet), " +
			"active (a process has them open), dead (that process is gone, or nobody came: `viaduct release " +
			"--dead` ends it), lost (a device is not there any more), incoming or leaving (its guest is on its way " +
			"between hosts: `viaduct help migrate`).\n\n" +
			"Examples:\n  viaduct leases\n" +
			"  viaduct leases --json",
		Flags: []cli.Flag{e.jsonFlag()},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("leases takes no arguments: it shows all")
			}
			return runLeases(e)
		},
	})
}

type quarantineView struct {
	Address string    `json:"address"`
	Path    string    `json:"path"`
	Guest   string    `json:"guest"`
	Since   time.Time `json:"since"`
	Why     string    `json:"why"`
}

type leasesView struct {
	Leases     []leaseView      `json:"leases"`     // null where a captured host does not tell
	Quarantine []quarantineView `json:"quarantine"` // the same
}

// lookAtLeases opens the host and looks at all its leases; the caller calls stop at the end.
func (e *env) lookAtLeases() (stop func(), m *lease.Manager, looks []lease.Look, err error) {
	stop, s, err := e.openLook()
	if err != nil {
		return nil, nil, nil, err
	}
	if m, err = lease.New(s, lease.Options{}); err == nil {
		looks, err = m.Look()
	}
	if err != nil {
		stop()
		return nil, nil, nil, err
	}
	return stop, m, looks, nil
}

func runLeases(e *env) error {
	stop, m, looks, err := e.lookAtLeases()
	if err != nil {
		return err
	}
	defer stop()
	quarantine, err := m.Book.Quarantined()
	if err != nil {
		return err
	}

	view := leasesView{Leases: []leaseView{}, Quarantine: []quarantineView{}}
	for _, look := range looks {
		view.Leases = append(view.Leases, viewLease(m, look))
	}

	for _, q := range quarantine {
		view.Quarantine = append(view.Quarantine, quarantineView{q.Address.String(), q.Place, q.Guest, q.Since, q.Why})
	}

	if e.tellUnknownBooks(m.Book); !m.Book.Known() && len(view.Leases)+len(view.Quarantine) == 0 {
		view = leasesView{}
	}

	slices.SortFunc(view.Quarantine, func(a, b quarantineView) int { return strings.Compare(a.Path, b.Path) })
	if e.json {
		e.printJSON(view)
		return nil
	}

	rows := [][]string{{"GUEST", "STATE", "DEVICES", "FROM", "AGE", "WHAT"}}
	for _, v := range view.Leases {
		var devices []string
		for _, d := range v.Devices {
			devices = append(devices, d.Address)
		}
		what := ptr(v.Why)
		if len(v.Holders) > 0 {
			what = strings.Join(v.Holders, ", ")
		}
		rows = append(rows, []string{v.Guest, string(v.State), strings.Join(devices, " "), v.From,
			ageAt(m.Host(), v.Made), what})
	}

	for _, q := range view.Quarantine {
		rows = append(rows, []string{q.Guest, "quarantine", q.Address, "", ageAt(m.Host(), q.Since), q.Why})
	}

	if len(rows) == 1 {
		e.note("no guest has a device, and nothing is in quarantine")
		return nil
	}

	e.printRows(rows)
	return nil
}

// ageAt is how old something is, and on a captured host, how old it was then; "" if neither that host nor a record
// says.
func ageAt(h *iommu.Host, since time.Time) string {
	now, known := h.Now()
	if !known || since.IsZero() {
		return ""
	}
	return now.Time.Sub(since).Round(time.Second).String()
}
