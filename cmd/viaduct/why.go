package main

import (
	"bufio"
	"errors"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/iommu"
)

func whyCommand(e *env) *cli.Command {
	var all bool
	var memory string
	return command(&cli.Command{
		Name:      "why",
		Usage:     "explain an IOMMU group, or what the devices of a guest lack",
		ArgsUsage: "SELECTOR | group=N | guest=NAME",
		Description: "viaduct computes the group from configuration space, as the kernel does, and compares it with " +
			"the kernel's. That needs root, and wakes the sleeping devices that matter for it. For a guest, viaduct " +
			"checks everything that its devices need, from the firmware to the VMM: each line is ok, no or " +
			"unknown, with the file that shows it and the command that helps.\n\n" +
			"Examples:\n  viaduct why enp1s0\n" +
			"  viaduct why group=8 --json\n" +
			"  viaduct why --all --json\n" +
			"  viaduct why guest=web --memory 8G",
		Flags: []cli.Flag{
			e.jsonFlag(),
			&cli.BoolFlag{Name: "all", Usage: "explain every group", Destination: &all},
			&cli.StringFlag{Name: "memory", Usage: "of a guest: its memory `SIZE` (e.g. 8G)", Destination: &memory},
		},
		BashComplete: func(c *cli.Context) {
			e.completeSelectors(c)
			for _, name := range e.guestNames() {
				e.suggest(guestKey + name)
			}
		},
		Action: func(c *cli.Context) error {
			size, err := parseSize(memory)
			if err != nil {
				return usagef("why: --memory %s: want a size, e.g. 8G", memory)
			}
			if all {
				if c.Args().Present() || size != 0 {
					return usagef("why: --all takes no device, guest or memory")
				}
				return runWhyAll(e)
			}
			arg, err := oneArgument(c, "the device, the group or the guest")
			if err != nil {
				return err
			}
			return whyArgument(e, arg, size)
		},
	})
}

// guestKey begins what names a guest.
const guestKey = "guest="

// whyArgument tells of what was named: a guest, if there is one of that name and no device.
func whyArgument(e *env, arg string, memory uint64) error {
	if name, ok := strings.CutPrefix(arg, guestKey); ok {
		return runWhyGuest(e, name, memory)
	}
	sel, wrong := iommu.ParseArgument(arg)
	guest, err := isGuest(e, arg)
	if err != nil {
		return err
	}
	if guest {
		d, err := deviceNamed(e, sel, wrong)
		if err != nil {
			return err
		}
		if d == nil {
			return runWhyGuest(e, arg, memory)
		}
		return usagef("%s is both a guest and a device: name %s%s, or the device as %s", arg, guestKey, arg, d.Name)
	}
	if memory != 0 {
		return usagef("why: --memory needs a guest, and %s is not one", arg)
	}
	if wrong != nil {
		return wrong
	}
	return runWhy(e, sel)
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
	Hint     *string        `json:"cure"`
}

// why is what there is to tell of a group, or of a device in none.
type why struct {
	at       iommu.Address // of the device that was asked for; of a group one of its members
	device   *iommu.Device // there; nil if nothing in the group is PCI
	group    *iommu.Group  // nil: in none
	computed iommu.Computed
	edges    []iommu.Edge
	none     string // why nothing can be said of its group, as a sentence
}

// agrees compares the computed group with the kernel's; nil if that cannot be known.
func (w *why) agrees() *bool {
	if w.group == nil || w.device == nil || !w.computed.Known {
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
	for _, a := range w.computed.Members {
		out = append(out, a.String())
	}
	return out
}

func (w *why) view() whyView {
	v := whyView{Members: w.members(), Agrees: w.agrees(), Edges: []edgeView{}}
	if w.group != nil {
		v.Group = &w.group.ID
	}
	if w.device != nil && w.computed.Known {
		v.Computed = w.ours()
	}
	for _, e := range w.edges {
		v.Edges = append(v.Edges, edgeView{e.From, e.To, e.Kind, e.Isolated, e.Reason, known(e.Hint)})
	}
	return v
}

// explain computes the group of a device, and finds the reasons for that and for the kernel's.
func explain(g *iommu.Grouping, a iommu.Address, group []iommu.Address) *why {
	w := &why{at: a, computed: g.Of(a)}
	w.edges = g.Edges(slices.Concat([]iommu.Address{a}, w.computed.Members, group))
	return w
}

// complete adds what the host's devices are.
func (w *why) complete(t *iommu.Topology) error {
	d, err := t.Find(w.at)
	if err != nil {
		return err
	}
	w.device, w.group = d, t.GroupOf(d)
	switch {
	case w.group != nil && w.group.NoIOMMU:
		w.none = "VFIO made that group in its noiommu mode: no IOMMU is in front of it, and nothing keeps it " +
			"from any memory."
		w.edges = nil
	case w.group != nil:
	case len(t.Units) == 0:
		w.none = "No IOMMU is on, without which there are no groups, and the kernel leaves ACS off (viaduct doctor)."
	case t.LateGroups():
		w.none = "With this kernel and IOMMU a device gets its group when a driver is first bound to it (viaduct bind)."
	}
	if w.none != "" {
		w.computed = iommu.Computed{}
	}
	return nil
}

func runWhy(e *env, sel iommu.Selector) error {
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	w, t, err := whyOne(h, sel)
	if err != nil {
		return err
	}
	if e.json {
		e.printJSON(w.view())
		return nil
	}
	names := iommu.OpenNames(h)
	defer names.Close()
	e.printText(func(out *bufio.Writer) { writeWhy(out, h, t, names, w) })
	return nil
}

// whyOne explains what a selector names. Where it is named by its address or number, no other devices are looked at
// than those that matter.
func whyOne(h *iommu.Host, sel iommu.Selector) (*why, *iommu.Topology, error) {
	a, found, err := quickly(h, sel)
	if err != nil {
		return nil, nil, err
	}
	if !found {
		t, err := look(h)
		if err != nil {
			return nil, nil, err
		}
		all, err := sel.Resolve(h, t)
		if err != nil {
			return nil, nil, err
		}
		d := all[0]
		if len(all) > 1 && !oneGroup(all) {
			if d, err = sel.One(h, t); err != nil {
				return nil, nil, err
			}
		}
		if !d.PCI {
			// Nothing is computed of it.
			return &why{group: t.GroupOf(d)}, t, nil
		}
		a = d.Address
	}

	g, err := iommu.NewGrouping(h)
	if err != nil {
		return nil, nil, err
	}
	group, err := groupAt(h, a)
	if err != nil {
		return nil, nil, err
	}
	w := explain(g, a, group)
	t, err := iommu.ScanSome(h, w.mentioned())
	if err == nil {
		err = declared.Roles(h, t)
	}
	if err == nil {
		err = w.complete(t)
	}
	return w, t, err
}

// mentioned are the devices that the reasons name.
func (w *why) mentioned() []iommu.Address {
	out := []iommu.Address{w.at}
	for _, e := range w.edges {
		out = append(out, e.From)
		if e.To != nil {
			out = append(out, *e.To)
		}
	}
	return out
}

// quickly is the device that an address, or the group that a number names: of a group its first PCI device. It is not
// found where there is none, and where the selector is of another form.
func quickly(h *iommu.Host, sel iommu.Selector) (a iommu.Address, found bool, err error) {
	if id, ok := sel.Group(); ok {
		g, err := iommu.ReadGroup(h, id)
		if errors.Is(err, iommu.ErrNotFound) {
			return a, false, nil
		}
		if err != nil {
			return a, false, err
		}
		for i := range g.Devices {
			if g.Devices[i].PCI {
				return g.Devices[i].Address, true, nil
			}
		}
		return a, false, nil
	}
	a, ok := sel.Address()
	if !ok {
		return a, false, nil
	}
	_, err = iommu.ReadDevice(h, a)
	if errors.Is(err, iommu.ErrNotFound) {
		return a, false, nil
	}
	return a, err == nil, err
}

// groupAt are the PCI devices of the kernel's group that a device is in.
func groupAt(h *iommu.Host, a iommu.Address) ([]iommu.Address, error) {
	d, err := iommu.ReadDevice(h, a)
	if err != nil || d.Group == nil {
		return nil, err
	}
	g, err := iommu.ReadGroup(h, *d.Group)
	if err != nil {
		return nil, err
	}
	return pciOf(g), nil
}

func pciOf(g *iommu.Group) []iommu.Address {
	var out []iommu.Address
	for i := range g.Devices {
		if g.Devices[i].PCI {
			out = append(out, g.Devices[i].Address)
		}
	}
	return out
}

func runWhyAll(e *env) error {
	h, t, err := e.look()
	if err != nil {
		return err
	}
	defer h.Close()
	g, err := iommu.NewGrouping(h)
	if err != nil {
		return err
	}
	var all []*why
	for i := range t.Groups {
		w, members := &why{group: &t.Groups[i]}, pciOf(&t.Groups[i])
		if len(members) > 0 {
			w = explain(g, members[0], members)
			if err := w.complete(t); err != nil {
				return err
			}
		}
		all = append(all, w)
	}

	if e.json {
		v := struct {
			Groups []whyView `json:"groups"`
		}{[]whyView{}}
		for _, w := range all {
			v.Groups = append(v.Groups, w.view())
		}
		e.printJSON(v)
		return nil
	}
	if len(all) == 0 {
		e.tellEmpty(h, t)
		return nil
	}
	names := iommu.OpenNames(h)
	defer names.Close()
	e.printText(func(out *bufio.Writer) {
		for i, w := range all {
			if i > 0 {
				out.WriteString("\n")
			}
			writeWhy(out, h, t, names, w)
		}
	})
	return nil
}
