package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/vmm"
	"viaduct/iommu"
)

func poolCommand(e *env) *cli.Command {
	var format string
	return command(&cli.Command{
		Name:      "pool",
		Usage:     "list the pools of VFs that guests draw from",
		ArgsUsage: "[NAME]",
		Description: "A pool is all VFs of /etc/viaduct/host.yaml with the same `pool:` name. `--format " +
			"libvirt-network` prints a pool as a network of libvirt, from which domains draw their interfaces. After " +
			"`viaduct install --libvirt` each drawn VF has a lease.\n\n" +
			"Examples:\n  viaduct pool\n" +
			"  viaduct pool net --format libvirt-network > net.xml",
		Flags: []cli.Flag{
			&cli.StringFlag{
				Name:        "format",
				Usage:       "print the pool in this format: `libvirt-network`",
				Destination: &format,
			},
			e.jsonFlag(),
		},
		BashComplete: func(*cli.Context) { e.suggest(e.pools()...) },
		Action: func(c *cli.Context) error {
			if c.NArg() > 1 {
				return usagef("pool: want one name, or none for all")
			}
			if format != "" && (format != "libvirt-network" || c.NArg() != 1) {
				return usagef("pool: --format needs libvirt-network and the name of one pool")
			}
			return runPool(e, c.Args().First(), format != "")
		},
	})
}

type poolView struct {
	Pool       string   `json:"pool"`
	VFs        []string `json:"vfs"`        // null where it could not be seen which they are
	Free       *int     `json:"free"`       // the same, and where a captured host does not tell of leases
	Leased     *int     `json:"leased"`     // the same
	Quarantine *int     `json:"quarantine"` // the same
	Kept       int      `json:"kept"`       // that no guest can have, as the host keeps something of their groups
	Why        *string  `json:"why"`
}

func runPool(e *env, only string, network bool) error {
	stop, m, looks, err := e.lookAtLeases()
	if err != nil {
		return err
	}
	defer stop()
	h := m.Host()
	s, err := hostfile.Load(h)
	if err != nil {
		return usageError{err}
	}

	names := declared.Pools(s)
	if only != "" && !slices.Contains(names, only) {
		return fmt.Errorf("unknown pool %q: /%s has %d pools", only, hostfile.File, len(names))
	}
	quarantine, err := m.Book.Quarantined()
	if err != nil {
		return err
	}
	if e.tellUnknownBooks(m.Book); network && !m.Book.Known() {
		return errors.New("this captured host does not show which VFs of the pool are in quarantine, and the network " +
			"must have none of them")
	}
	dm := m.Declared()
	views := []poolView{}
	for _, name := range names {
		if only != "" && name != only {
			continue
		}
		v := poolView{Pool: name}
		vfs, err := dm.Pool(s, name)
		if err != nil {
			if network {
				return err
			}
			v.Why = known(err.Error())
		}

		if network {
			var addresses []iommu.Address
			for _, vf := range vfs {
				why, err := quarantine.Of(h, vf)
				if err != nil {
					return fmt.Errorf("viaduct cannot tell whether %s is in quarantine, and the network must have none "+
						"that is: %w", vf.Name, err)
				}
				if why == "" && m.Topology.KeptWith(vf) == nil {
					addresses = append(addresses, vf.Address)
				}
			}
			fmt.Fprint(e.stdout, vmm.LibvirtNetwork(name, addresses))
			return nil
		}

		if err == nil || errors.Is(err, iommu.ErrNotFound) {
			v.count(m, vfs, looks, quarantine)
		}
		views = append(views, v)
	}

	if e.json {
		e.printJSON(views)
		return nil
	}
	rows := [][]string{{"POOL", "VFS", "FREE", "LEASED", "QUARANTINE", "WHAT"}}
	for _, v := range views {
		rows = append(
			rows,
			[]string{
				v.Pool,
				v.size(),
				numberText(v.Free),
				numberText(v.Leased),
				numberText(v.Quarantine),
				ptr(v.Why),
			},
		)
	}
	if len(rows) == 1 {
		e.note("no pool is declared in /%s: add pool: NAME to a range of VFs", hostfile.File)
		return nil
	}
	e.printRows(rows)
	return nil
}

// count says what the VFs of a pool are.
func (v *poolView) count(m *lease.Manager, vfs []*iommu.Device, looks []lease.Look, quarantine lease.Quarantined) {
	v.VFs = []string{}
	var free, leased, fouled int
	var unknown error
	for _, vf := range vfs {
		v.VFs = append(v.VFs, vf.Name)
		why, err := quarantine.Of(m.Host(), vf)
		switch {
		case slices.ContainsFunc(looks, func(l lease.Look) bool { return l.Has(vf.Address) }):
			leased++
		case err != nil:
			unknown = fmt.Errorf("viaduct cannot tell whether %s is in quarantine: %w", vf.Name, err)
		case why != "":
			fouled++
		case m.Topology.KeptWith(vf) != nil:
			v.Kept++
			v.Why = known(declared.Kept(vf, m.Topology.KeptWith(vf)))
		default:
			free++
		}
	}
	if m.Book.Known() {
		v.Leased = &leased
	}
	switch {
	case unknown != nil:
		v.Why = known(unknown.Error())
	case m.Book.Known():
		v.Free, v.Quarantine = &free, &fouled
	}
}

// size is the number of a pool's VFs, "" if it is not known.
func (v *poolView) size() string {
	if v.VFs == nil {
		return ""
	}
	return strconv.Itoa(len(v.VFs))
}

// numberText is a number, "" if it is not known.
func numberText(n *int) string {
	if n == nil {
		return ""
	}
	return strconv.Itoa(*n)
}
