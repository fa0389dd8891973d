package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
)

func vfCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:  "vf",
		Usage: "virtual functions: list, create, destroy, set",
		Subcommands: []*cli.Command{
			vfListCommand(e), vfCreateCommand(e), vfDestroyCommand(e), vfSetCommand(e),
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("vf: there is no command %q (viaduct vf --help lists them)", c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	})
}

func vfListCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name: "list", Aliases: []string{"ls"},
		Usage:        "the PFs and their VFs",
		ArgsUsage:    "[PF...]",
		Description:  "Examples:\n  viaduct vf list\n  viaduct vf list enp1s0 --json",
		Flags:        []cli.Flag{e.jsonFlag()},
		BashComplete: e.completePFs,
		Action: func(c *cli.Context) error {
			sel, err := parseSelectors(c.Args().Slice())
			if err != nil {
				return err
			}
			return runVFList(e, sel)
		},
	})
}

type createOptions struct {
	pf    iommu.Selector
	count int
	use   sriov.Use
}

func vfCreateCommand(e *env) *cli.Command {
	var driver string
	return command(&cli.Command{
		Name:      "create",
		Usage:     "make N the number of VFs of a PF",
		ArgsUsage: "PF N",
		Description: "N is the total afterwards: with 2 VFs there, `create PF 4` ends with 4. From one number to another all VFs go first,\n" +
			"which is refused (exit status 3) while one is in use. The new VFs never meet the host's own driver unless --driver home\n" +
			"says so: they have none (`bind` gives them one), or with --driver vfio a vfio driver at once.\n\n" +
			"Examples:\n  viaduct vf create enp1s0 4\n  viaduct vf create 0000:01:00.0 7 --driver vfio\n  viaduct vf create enp1s0 4 --dry-run",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "driver", Usage: "what drives the VFs: `none|vfio|home`", Value: string(sriov.UseNone), Destination: &driver},
			e.dryRunFlag(),
		},
		BashComplete: e.completePFs,
		Action: func(c *cli.Context) error {
			if c.NArg() != 2 {
				return usagef("vf create: want the PF and the number of VFs it is to have")
			}
			o := createOptions{use: sriov.Use(driver)}
			var err error
			if o.pf, err = iommu.ParseSelector(c.Args().Get(0)); err != nil {
				return err
			}
			if o.count, err = strconv.Atoi(c.Args().Get(1)); err != nil || o.count < 0 {
				return usagef("vf create: %q is no number of VFs", c.Args().Get(1))
			}
			if o.use != sriov.UseNone && o.use != sriov.UseVFIO && o.use != sriov.UseHome {
				return usagef("vf create: --driver is none, vfio or home, not %q", driver)
			}
			return runVFCount(c.Context, e, o)
		},
	})
}

func vfDestroyCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:      "destroy",
		Usage:     "remove all VFs of a PF",
		ArgsUsage: "PF",
		Description: "Refused (exit status 3) while a VF is open in a process, carries the default route, or has a file system mounted.\n\n" +
			"Examples:\n  viaduct vf destroy enp1s0",
		Flags:        []cli.Flag{e.dryRunFlag()},
		BashComplete: e.completePFs,
		Action: func(c *cli.Context) error {
			arg, err := oneArgument(c, "the PF")
			if err != nil {
				return err
			}
			pf, err := iommu.ParseSelector(arg)
			if err != nil {
				return err
			}
			return runVFCount(c.Context, e, createOptions{pf: pf, use: sriov.UseNone})
		},
	})
}

type setOptions struct {
	vf  iommu.Selector
	mac net.HardwareAddr
}

func vfSetCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:         "set",
		Usage:        "set what the PF decides for a VF: mac",
		ArgsUsage:    "PF/vfN mac=ADDRESS",
		Description:  "The setting is read back and compared. A driver that has the VF sees it when it binds next.\n\nExamples:\n  viaduct vf set enp1s0/vf0 mac=52:54:00:12:34:56",
		Flags:        []cli.Flag{e.dryRunFlag()},
		BashComplete: e.completeVFs,
		Action: func(c *cli.Context) error {
			if c.NArg() < 2 {
				return usagef("vf set: want a VF and a setting, as enp1s0/vf0 mac=52:54:00:12:34:56")
			}
			var o setOptions
			var err error
			if o.vf, err = iommu.ParseSelector(c.Args().First()); err != nil {
				return err
			}
			for _, s := range c.Args().Tail() {
				key, value, ok := strings.Cut(s, "=")
				if !ok || key != "mac" {
					return usagef("vf set: %q is no setting; want mac=ADDRESS", s)
				}
				if o.mac != nil {
					return usagef("vf set: mac is given twice")
				}
				if o.mac, err = net.ParseMAC(value); err != nil || len(o.mac) != 6 {
					return usagef("vf set: %q is no MAC address", value)
				}
				if o.mac[0]&1 != 0 {
					return usagef("vf set: %s is a multicast address, which no interface can have", value)
				}
			}
			return runVFSet(e, o)
		},
	})
}

type vfListView struct {
	PFs []pfView `json:"pfs"`
}

type pfView struct {
	Address   string   `json:"address"`
	Name      *string  `json:"name"`
	Driver    *string  `json:"driver"`
	Netdevs   []string `json:"netdevs"`
	Total     int      `json:"total"`
	Enabled   int      `json:"enabled"`
	Autoprobe *bool    `json:"autoprobe"`
	VFs       []vfView `json:"vfs"`
}

type vfView struct {
	Index          int     `json:"index"`
	Address        string  `json:"address"`
	Group          *int    `json:"group"`
	Driver         *string `json:"driver"`
	DriverOverride *string `json:"driver_override"`
	MAC            *string `json:"mac"`
}

func runVFList(e *env, sel []iommu.Selector) error {
	h, t, err := e.look()
	if err != nil {
		return err
	}
	defer h.Close()
	keep, err := selection(h, t, sel)
	if err != nil {
		return err
	}
	names := iommu.OpenNames(h)
	defer names.Close()
	view := vfListView{PFs: []pfView{}}
	t.All(func(d *iommu.Device) bool {
		if keep != nil && keep[d.Name] && d.SRIOV == nil {
			err = &sriov.NotPFError{Device: d.Address, VFOf: d.PhysFn}
			return false
		}
		if d.SRIOV == nil || (keep != nil && !keep[d.Name]) {
			return true
		}
		var pf pfView
		if pf, err = viewPF(h, t, names, d); err != nil {
			return false
		}
		view.PFs = append(view.PFs, pf)
		return true
	})
	if err != nil {
		return err
	}
	w := bufio.NewWriter(e.stdout)
	if e.json {
		err = writeJSON(w, view)
	} else {
		rows := [][]string{{"PF", "VF", "ADDRESS", "GROUP", "DRIVER", "OVERRIDE", "MAC"}}
		for _, p := range view.PFs {
			label := p.Address
			if len(p.Netdevs) > 0 {
				label = p.Netdevs[0]
			}
			rows = append(rows, []string{label, fmt.Sprintf("%d/%d", p.Enabled, p.Total), p.Address, "", ptr(p.Driver), "", ""})
			for _, v := range p.VFs {
				group := ""
				if v.Group != nil {
					group = strconv.Itoa(*v.Group)
				}
				rows = append(rows, []string{label, "vf" + strconv.Itoa(v.Index), v.Address, group, ptr(v.Driver), ptr(v.DriverOverride), ptr(v.MAC)})
			}
		}
		writeTable(w, rows)
	}
	if err != nil {
		return err
	}
	return w.Flush()
}

func viewPF(h *iommu.Host, t *iommu.Topology, names *iommu.Names, d *iommu.Device) (pfView, error) {
	v := pfView{
		Address: d.Name, Name: known(deviceName(names, d)), Driver: known(d.Driver), Netdevs: deviceOf(d, names).Netdevs,
		Total: d.SRIOV.Total, Enabled: len(d.SRIOV.VFs), VFs: []vfView{},
	}
	x, err := iommu.ReadDetails(h, d.Address)
	if err != nil {
		return v, err
	}
	if x.VFs != nil {
		v.Autoprobe = x.VFs.Autoprobe
	}
	macs := map[int]net.HardwareAddr{}
	if h.Live() {
		if macs, err = sriov.MACs(d); err != nil {
			return v, err
		}
	}
	for _, at := range d.SRIOV.VFs {
		vf, err := t.Find(at.Address)
		if err != nil {
			continue // made or removed just now
		}
		row := vfView{Index: at.Index, Address: vf.Name, Driver: known(vf.Driver), DriverOverride: known(vf.DriverOverride), MAC: known(macs[at.Index].String())}
		if vf.Group >= 0 {
			row.Group = &vf.Group
		}
		v.VFs = append(v.VFs, row)
	}
	return v, nil
}

// runVFCount is create and destroy: both set the number of VFs.
func runVFCount(ctx context.Context, e *env, o createOptions) error {
	h, t, err := e.lookToChange()
	if err != nil {
		return err
	}
	defer h.Close()
	pf, err := o.pf.One(h, t)
	if err != nil {
		return err
	}
	plan, err := sriov.PlanCount(h, pf, o.count, o.use)
	if err != nil {
		return usageIfMeant(err)
	}
	if err := sriov.Check(h, t, plan); err != nil {
		return err
	}
	for _, n := range plan.Notes {
		e.note("%s", n)
	}
	if e.dryRun {
		for _, s := range plan.Steps() {
			fmt.Fprintln(e.stdout, s)
		}
		return nil
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	if err := sriov.Apply(ctx, h, journal.In(journal.Dir), plan); err != nil {
		return err
	}
	if plan.Have == plan.Want {
		fmt.Fprintf(e.stdout, "%s has %d of %d VFs already\n", pf.Name, plan.Want, pf.SRIOV.Total)
	} else {
		fmt.Fprintf(e.stdout, "%s: %d -> %d of %d VFs\n", pf.Name, plan.Have, plan.Want, pf.SRIOV.Total)
	}
	return nil
}

// usageIfMeant makes errors of the request itself (no PF, too many) usage errors.
func usageIfMeant(err error) error {
	var outOfRange *sriov.RangeError
	var notPF *sriov.NotPFError
	if errors.As(err, &outOfRange) || errors.As(err, &notPF) {
		return usageError{err}
	}
	return err
}

func runVFSet(e *env, o setOptions) error {
	h, t, err := e.lookToChange()
	if err != nil {
		return err
	}
	defer h.Close()
	vf, err := o.vf.One(h, t)
	if err != nil {
		return err
	}
	if vf.PhysFn == nil {
		return usagef("%s is no VF; want PF/vfN or a VF's address", vf.Name)
	}
	pf, err := t.Find(*vf.PhysFn)
	if err != nil {
		return err
	}
	if len(pf.Netdevs) == 0 {
		return fmt.Errorf("%s has no network interface, so its VFs have no MAC address to set", pf.Name)
	}
	if e.dryRun {
		fmt.Fprintf(e.stdout, "ip link set %s vf %d mac %s\n", pf.Netdevs[0], vf.VFIndex, o.mac)
		return nil
	}
	if err := sriov.SetMAC(pf, vf.VFIndex, o.mac); err != nil {
		return err
	}
	fmt.Fprintf(e.stdout, "%s (vf%d of %s): mac %s\n", vf.Name, vf.VFIndex, pf.Name, o.mac)
	return nil
}
