package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/terminal"
	"viaduct/cmd/internal/vmm"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// generate is the word that the shells' scripts put behind those that were typed, but for the one that is being typed.
const generate = "--generate-bash-completion"

// completeValue prints the values of the option that was typed last; false if none was, or it has no values to be
// named, as files, which the shells know.
func (e *env) completeValue(app *cli.App, args []string) bool {
	if len(args) < 3 || args[len(args)-1] != generate {
		return false
	}
	typed := args[1 : len(args)-1]
	flags, commands, command := app.Flags, app.Commands, ""
	for n, arg := range typed {
		if n > 0 && typed[n-1] == "--host" {
			// What is completed is that of the captured host.
			e.hostName = arg
		}
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(arg) })
		if i < 0 {
			continue
		}
		command = strings.TrimSpace(command + " " + commands[i].Name)
		flags, commands = append(slices.Clone(app.Flags), commands[i].Flags...), commands[i].Subcommands
	}

	last := typed[len(typed)-1]
	flag := flagNamed(flags, last)
	if !strings.HasPrefix(last, "-") || flag == nil || !takesValue(flags, last) {
		return e.completeSettings(command, typed)
	}
	e.printEach(e.valuesOf(command, flag.Names()[0]))
	return true
}

// valuesOf are the values of a command's option.
func (e *env) valuesOf(command, flag string) []string {
	switch flag {
	case "color":
		return terminal.Colours
	case "output":
		return []string{"wide", "json"}
	case "format":
		if command == "pool" {
			return []string{"libvirt-network"}
		}
		return vmm.Names()
	case "force":
		if command == "release" {
			return nil
		}
		var kinds []string
		for _, k := range holder.Kinds() {
			kinds = append(kinds, string(k))
		}
		return kinds
	case "driver":
		if command == "vf create" {
			return append([]string{string(sriov.UseNone), string(sriov.UseVFIO), string(sriov.UseHome)}, e.vfioDrivers()...)
		}
		return append([]string{bind.Auto, bind.None}, e.vfioDrivers()...)
	case "from":
		return append(e.pools(), e.selectorsOf(func(d *iommu.Device) []string { return ownWords(d) })...)
	case "eswitch":
		return sriov.EswitchModes()
	case "inline-mode":
		return sriov.InlineModes()
	case "encap":
		return sriov.EncapModes()
	case "hw-tc-offload":
		return []string{"on", "off"}
	case "vlan", "mac":
		return map[string][]string{"mac": {sriov.StableMAC}}[flag]
	case "set":
		return settingWords()
	}
	return nil
}

// completeSettings prints the keys of settings where those are typed next.
func (e *env) completeSettings(command string, typed []string) bool {
	arguments := 0
	for _, w := range typed[min(len(typed), len(strings.Fields(command))):] {
		if !strings.HasPrefix(w, "-") {
			arguments++
		}
	}
	if command != "vf set" || arguments == 0 {
		return false
	}
	e.printEach(settingWords())
	return true
}

func settingWords() []string {
	var out []string
	for _, k := range sriov.Keys() {
		out = append(out, string(k)+"=")
	}
	return out
}

// vfioDrivers are the drivers that a device can be taken with: those that are loaded, and vfio-pci, which can be.
func (e *env) vfioDrivers() []string {
	out := []string{"vfio-pci", "pci-stub"}
	h, err := e.open()
	if err != nil {
		return out
	}
	defer h.Close()
	names, _ := h.Names("sys/bus/pci/drivers")
	for _, n := range names {
		if iommu.IsVFIODriver(n) && !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}

// pools are the pools that are declared.
func (e *env) pools() []string {
	h, err := e.open()
	if err != nil {
		return nil
	}
	defer h.Close()
	s, err := hostfile.Load(h)
	if err != nil {
		return nil
	}
	return declared.Pools(s)
}

// selectorsOf are what f says of each device.
func (e *env) selectorsOf(f func(*iommu.Device) []string) []string {
	h, err := e.open()
	if err != nil {
		return nil
	}
	defer h.Close()
	t, err := iommu.Scan(h)
	if err != nil {
		return nil
	}
	var out []string
	t.All(func(d *iommu.Device) bool {
		out = append(out, f(d)...)
		return true
	})
	slices.Sort(out)
	return slices.Compact(out)
}

// ownWords are a device's name and its interfaces'.
func ownWords(d *iommu.Device) []string { return append([]string{d.Name}, d.Netdevs...) }

// keyedWords are the selectors with keys that name a device, as far as they need no look at it.
func keyedWords(d *iommu.Device) []string {
	var out []string
	if d.Group != nil {
		out = append(out, fmt.Sprintf("group=%d", *d.Group))
	}
	if d.PCI {
		out = append(out, fmt.Sprintf("class=%04x", d.Class>>8), idText(d))
	}
	return out
}

// guestNames are the guests that have a lease, as far as they may be known.
func (e *env) guestNames() []string {
	h, err := e.open()
	if err != nil {
		return nil
	}
	defer h.Close()
	var out []string
	all, _ := lease.BookOf(h).All()
	for _, l := range all {
		out = append(out, l.Guest)
	}
	return out
}

// printEach prints candidates that mean nothing to a shell.
func (e *env) printEach(words []string) {
	for _, w := range words {
		if harmless(w) {
			fmt.Fprintln(e.stdout, w)
		}
	}
}
