package main

import (
	"bufio"
	"slices"

	"github.com/urfave/cli/v2"

	"viaduct/iommu"
)

func whyCommand(e *env) *cli.Command {
	all := false
	return command(&cli.Command{
		Name:      "why",
		Usage:     "tell why an IOMMU group is what it is, and what would split it",
		ArgsUsage: "SELECTOR | group=N",
		Description: "The group is computed from config space, the way the kernel does it, and compared with the kernel's own. That takes\n" +
			"root, and wakes those devices that sleep and matter for it.\n\n" +
			"Examples:\n  viaduct why enp1s0\n  viaduct why group=8 --json\n  viaduct why --all --json",
		Flags: []cli.Flag{e.jsonFlag(), &cli.BoolFlag{
			Name: "all", Usage: "tell it of every group", Destination: &all,
		}},
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) error {
			if all {
				if c.Args().Present() {
					return usagef("why: name a device, or use --all, not both")
				}
				return runWhyAll(e)
			}
			arg, err := oneArgument(c, "the device or the group")
			if err != nil {
				return err
			}
			sel, err := iommu.ParseSelector(arg)
			if err != nil {
				return err
			}
			return runWhy(e, sel)
		},
	})
}

// whyView is `why --json`.
type whyView struct {
	Group    *int       `json:"group"`
	Members  []string   `json:"members"`
	Computed []string   `json:"computed"` // null: not known
	Agrees   *bool      `json:"agrees"`
	Edges    []edgeView `json:"edges"`
}

type edgeView struct {
	From     iommu.Address  `json:"from"`
	To       *iommu.Address `json:"to"`
	Kind     iommu.EdgeKind `json:"kind"`
	Isolated *bool          `json:"isolated"`
	Reason   string         `json:"reason"`
	Cure     *string        `json:"cure"`
}

// why is what there is to tell of a group, or of a device in none.
type why struct {
	device   *iommu.Device // that was asked for; of a group one of its members, nil if none is PCI
	group    *iommu.Group  // nil: in none
	computed iommu.Computed
	edges    []iommu.Edge
}

// isPCI reports whether there is a PCI device to compute with.
func (w *why) isPCI() bool { return w.device != nil && w.device.PCI }

// agrees compares the computed group with the kernel's; nil if that cannot be known.
func (w *why) agrees() *bool {
	if w.group == nil || w.group.NoIOMMU || !w.isPCI() || !w.computed.Known {
		return nil
	}
	return new(slices.Equal(w.members(), w.ours()))
}

func (w *why) members() []string {
	out := []string{}
	if w.group != nil {
		for i := range w.group.Devices {
			out = append(out, w.group.Devices[i].Name)
		}
	}
	return out
}

func (w *why) ours() []string {
	out := []string{}
	for _, d := range w.computed.Members {
		out = append(out, d.Name)
	}
	return out
}

func (w *why) view() whyView {
	v := whyView{Members: w.members(), Agrees: w.agrees(), Edges: []edgeView{}}
	if w.group != nil {
		v.Group = &w.group.ID
	}
	if w.isPCI() && w.computed.Known {
		v.Computed = w.ours()
	}
	for _, e := range w.edges {
		v.Edges = append(v.Edges, edgeView{e.From, e.To, e.Kind, e.Isolated, e.Reason, known(e.Cure)})
	}
	return v
}

// explain computes a group by one of its devices.
func explain(g *iommu.Grouping, group *iommu.Group, d *iommu.Device) *why {
	w := &why{device: d, group: group}
	if d == nil {
		for i := range group.Devices {
			if group.Devices[i].PCI {
				w.device = &group.Devices[i]
				break
			}
		}
	}
	if w.device == nil || !w.device.PCI || group != nil && group.NoIOMMU {
		return w
	}
	w.computed = g.Of(w.device)
	// Those of both, if they differ.
	all := append([]*iommu.Device{w.device}, w.computed.Members...)
	if group != nil {
		for i := range group.Devices {
			all = append(all, &group.Devices[i])
		}
	}
	w.edges = g.Edges(all)
	return w
}

func runWhy(e *env, sel iommu.Selector) error {
	h, t, err := e.look()
	if err != nil {
		return err
	}
	defer h.Close()
	group, d, err := groupFor(h, t, sel)
	if err != nil {
		return err
	}
	g, err := groupingOf(h, t)
	if err != nil {
		return err
	}
	w := explain(g, group, d)
	if e.json {
		return writeJSON(e.stdout, w.view())
	}
	names := iommu.OpenNames(h)
	defer names.Close()
	out := bufio.NewWriter(e.stdout)
	writeWhy(out, h, t, names, g, w)
	return out.Flush()
}

// groupFor is the group that a selector names, or the device that it names and its group.
func groupFor(h *iommu.Host, t *iommu.Topology, sel iommu.Selector) (*iommu.Group, *iommu.Device, error) {
	if id, ok := sel.Group(); ok {
		g, err := t.Group(id)
		if err != nil {
			// Which knows what groups there are.
			_, err = sel.Resolve(h, t)
		}
		return g, nil, err
	}
	d, err := sel.One(h, t)
	if err != nil || d.Group == nil {
		return nil, d, err
	}
	g, err := t.Group(*d.Group)
	return g, d, err
}

func groupingOf(h *iommu.Host, t *iommu.Topology) (*iommu.Grouping, error) {
	return iommu.NewGrouping(h, t, nil)
}

func runWhyAll(e *env) error {
	h, t, err := e.look()
	if err != nil {
		return err
	}
	defer h.Close()
	g, err := groupingOf(h, t)
	if err != nil {
		return err
	}
	if e.json {
		v := struct {
			Groups []whyView `json:"groups"`
		}{[]whyView{}}
		for i := range t.Groups {
			v.Groups = append(v.Groups, explain(g, &t.Groups[i], nil).view())
		}
		return writeJSON(e.stdout, v)
	}

	names := iommu.OpenNames(h)
	defer names.Close()
	out := bufio.NewWriter(e.stdout)
	for i := range t.Groups {
		if i > 0 {
			out.WriteString("\n")
		}
		writeWhy(out, h, t, names, g, explain(g, &t.Groups[i], nil))
	}
	return out.Flush()
}
