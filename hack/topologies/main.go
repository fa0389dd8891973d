// Command topologies makes up a host of the lab (hack/lab.d/hosts) out of QEMU's bridges and devices, for what computes
// IOMMU groups:
//
//	topologies [-arch amd64|arm64] SEED
//
// The same seed makes the same host. Each subtree of its root bus begins with a comment that has its shape.
package main

import (
	"flag"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
)

func main() {
	log.SetFlags(0)
	arch := flag.String("arch", "amd64", "of the host")
	flag.Parse()
	seed, err := strconv.ParseUint(flag.Arg(0), 10, 64)
	if err != nil || flag.NArg() != 1 || *arch != "amd64" && *arch != "arm64" {
		log.Fatal("usage: topologies [-arch amd64|arm64] SEED")
	}
	fmt.Fprint(os.Stdout, host(*arch, seed))
}

// subtrees is how many a host has, each in a slot of its root bus.
const subtrees = 8

// host is the host file of a seed.
func host(arch string, seed uint64) string {
	g := &generator{random: rand.New(rand.NewPCG(seed, 0x70b01091e5))}
	var out strings.Builder
	fmt.Fprintf(&out, "# Made by hack/topologies from seed %d.\n", seed)
	if arch == "arm64" {
		out.WriteString("arch arm64\niommu smmu\nmemory 1G\n")
	} else {
		out.WriteString("iommu amd-vi\nmemory 2G\n")
	}
	seen := map[string]bool{}
	for slot := 0; slot < subtrees; {
		before := *g
		g.lines = nil
		shape := g.subtree(0x10 + slot)
		if seen[shape] {
			before.lines = nil
			*g = before
			continue
		}
		seen[shape] = true
		fmt.Fprintf(&out, "\n# %s\n%s\n", shape, strings.Join(g.lines, "\n"))
		slot++
	}
	if len(g.halfOpen) > 0 {
		fmt.Fprintf(&out, "\nappend pci=config_acs=%s\n", strings.Join(g.halfOpen, ";"))
	}
	return out.String()
}

// generator makes devices; random goes on when one is thrown away.
type generator struct {
	random *rand.Rand
	lines  []string
	made   int // devices so far, for their names
	// halfOpen are the ports whose ACS the kernel is told to turn off in part (request redirect).
	halfOpen []string
	wide     int // those that need I/O ports, of which there is room for few
}

// most is how many devices may need I/O ports: a bridge gives 4 KiB of the 64 to each bus with one.
const most = 7

// device adds one, and returns its name.
func (g *generator) device(model, bus string, options ...string) string {
	g.made++
	name := fmt.Sprintf("d%d", g.made)
	words := append([]string{model, "id=" + name, "bus=" + bus}, options...)
	g.lines = append(g.lines, "-device "+strings.Join(words, ","))
	return name
}

func at(slot, function int) string { return fmt.Sprintf("addr=%#x.%d", slot, function) }

// place is where a function is; of the first of several it says so.
func place(slot, function, functions int) []string {
	if function == 0 && functions > 1 {
		return []string{at(slot, function), "multifunction=on"}
	}
	return []string{at(slot, function)}
}

func (g *generator) port() []string {
	return []string{fmt.Sprintf("chassis=%d", g.made+1), fmt.Sprintf("slot=%d", g.made+1)}
}

// subtree makes what is in one slot of the root bus, and returns its shape.
func (g *generator) subtree(slot int) string {
	const root = "pcie.0"
	switch g.random.IntN(8) {
	case 0:
		return g.functions(root, slot, 2+g.random.IntN(3), g.express)
	case 1:
		bridge := g.device("pcie-pci-bridge", root, at(slot, 0))
		return "bridge(" + g.conventionals(bridge, 2) + ")"
	case 2:
		bridge := g.device("i82801b11-bridge", root, at(slot, 0))
		return "dmi-bridge(" + g.conventionals(bridge, 1) + ")"
	}

	n := 1
	if g.random.IntN(3) == 0 {
		n = 2 + g.random.IntN(2)
	}

	var shapes []string
	for f := range n {
		options := append(g.port(), place(slot, f, n)...)
		name, model := "port", "pcie-root-port"
		switch g.random.IntN(6) {
		case 0:
			// It has no ACS.
			name, model = "open-port", "ioh3420"
		case 1:
			name = "half-open-port"
			g.halfOpen = append(g.halfOpen, fmt.Sprintf("xxxx0xx@00:%02x.%d", slot, f))
		}
		port := g.device(model, root, options...)
		shapes = append(shapes, name+"("+g.below(port, 2)+")")
	}

	return strings.Join(shapes, "+")
}

// below makes what is behind a port.
func (g *generator) below(bus string, depth int) string {
	kind := g.random.IntN(8)
	switch {
	case kind < 3 && depth > 0:
		return g.downstream(bus, depth)
	case kind == 3:
		return g.functions(bus, 0, 2+g.random.IntN(3), g.express)
	case kind == 4 && depth > 0:
		return "bridge(" + g.conventionals(g.device("pcie-pci-bridge", bus, at(0, 0)), 1) + ")"
	case kind == 5 && g.wide < most:
		g.wide++
		return g.one("igb", bus, place(0, 0, 1))
	case kind == 6:
		return g.conventional(bus, place(0, 0, 1))
	}
	return g.express(bus, place(0, 0, 1))
}

// downstream makes a switch, with ports in slots of their own or as functions of one.
func (g *generator) downstream(bus string, depth int) string {
	up := g.device("x3130-upstream", bus, at(0, 0))
	ports, together := 1+g.random.IntN(3), g.random.IntN(3) == 0
	var shapes []string
	for i := range ports {
		where := place(i, 0, 1)
		if together {
			where = place(0, i, ports)
		}
		port := g.device("xio3130-downstream", up, append(g.port(), where...)...)
		shapes = append(shapes, g.below(port, depth-1))
	}
	name := "switch"
	if together && ports > 1 {
		name = "one-slot-switch"
	}
	return name + "(" + strings.Join(shapes, ",") + ")"
}

// conventionals makes what is on a bus of conventional PCI.
func (g *generator) conventionals(bus string, depth int) string {
	var shapes []string
	for slot := 1; slot <= 1+g.random.IntN(3); slot++ {
		switch kind := g.random.IntN(5); {
		case kind == 0 && depth > 0:
			bridge := g.device("pci-bridge", bus, fmt.Sprintf("chassis_nr=%d", g.made+1), at(slot, 0))
			shapes = append(shapes, "bridge("+g.conventionals(bridge, depth-1)+")")
		case kind == 1:
			shapes = append(shapes, g.functions(bus, slot, 2, g.conventional))
		default:
			shapes = append(shapes, g.conventional(bus, place(slot, 0, 1)))
		}
	}
	return strings.Join(shapes, ",")
}

// functions makes a device of several functions.
func (g *generator) functions(bus string, slot, n int, one func(bus string, where []string) string) string {
	var shapes []string
	for f := range n {
		shapes = append(shapes, one(bus, place(slot, f, n)))
	}
	return "{" + strings.Join(shapes, "+") + "}"
}

func (g *generator) one(model, bus string, where []string, options ...string) string {
	g.device(model, bus, append(where, options...)...)
	return model
}

// express makes a device that is PCI Express where it can be.
func (g *generator) express(bus string, where []string) string {
	switch kind := g.random.IntN(5); {
	case kind == 0:
		return g.one("nvme", bus, where, fmt.Sprintf("serial=lab%d", g.made))
	case kind == 1 && g.wide < most:
		g.wide++
		return g.one("e1000e", bus, where)
	case kind == 2:
		return g.one("virtio-rng-pci", bus, where, "disable-legacy=on", "iommu_platform=on")
	}
	return g.one("qemu-xhci", bus, where)
}

// conventional makes a device without a PCI Express capability.
func (g *generator) conventional(bus string, where []string) string {
	if g.random.IntN(4) == 0 && g.wide < most {
		g.wide++
		return g.one("e1000", bus, where)
	}
	return g.one("edu", bus, where)
}
