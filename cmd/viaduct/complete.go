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
	"viaduct/vfio/holder"
)

// generate is the word that the shells' scripts put behind those that were typed, of which the last is the one that is
// being typed: "" if none is begun.
const generate = "--generate-bash-completion"

// typing is a command line that is not complete yet.
type typing struct {
	command   string // e.g. "vf set"
	is        *cli.Command
	flags     []cli.Flag // of the command, and of the program
	commands  []*cli.Command
	arguments int    // that were typed of the command's
	last      string // the word before the one that is being typed
}

// complete prints what may stand next on a command line, one a line; false if it is none that a shell asks to complete.
// Where nothing is printed, the shells offer files.
func (e *env) complete(app *cli.App, args []string) bool {
	if len(args) < 3 || args[len(args)-1] != generate {
		return false
	}
	typed := args[1 : len(args)-2]
	e.begun = args[len(args)-2]
	if slices.Contains(typed, "--") {
		// What follows is another program's command line.
		return true
	}

	t := e.read(app, typed)
	option, value, with := strings.Cut(e.begun, "=")
	switch {
	case strings.HasPrefix(e.begun, "-") && with:
		e.suggestValues(t, option, option+"=", value)
	case strings.HasPrefix(e.begun, "-"):
		for _, f := range t.flags {
			e.suggest("--" + f.Names()[0])
		}
	case strings.HasPrefix(t.last, "-") && takesValue(t.flags, t.last):
		e.suggestValues(t, t.last, "", e.begun)
	case len(t.commands) > 0:
		for _, c := range t.commands {
			if !c.Hidden {
				e.suggest(c.Names()...)
			}
		}
	case t.is != nil && t.is.BashComplete != nil:
		e.typed = t
		t.is.BashComplete(cli.NewContext(app, nil, nil))
	}
	return true
}

// read finds the command among words, and what of it was typed.
func (e *env) read(app *cli.App, words []string) *typing {
	t := &typing{flags: app.Flags, commands: app.Commands}
	for _, word := range words {
		value := strings.HasPrefix(t.last, "-") && takesValue(t.flags, t.last)
		if value && t.last == "--host" {
			// What is completed is that of the captured host.
			e.hostName = word
		}
		t.last = word
		if value || strings.HasPrefix(word, "-") {
			continue
		}
		i := slices.IndexFunc(t.commands, func(c *cli.Command) bool { return c.HasName(word) })
		if i < 0 {
			t.arguments++
			continue
		}
		t.is = t.commands[i]
		t.command = strings.TrimSpace(t.command + " " + t.is.Name)
		t.flags, t.commands = slices.Concat(t.is.Flags, app.Flags), t.is.Subcommands
	}
	return t
}

// suggest prints those words that the one that is being typed may become, but for what means something to a shell.
func (e *env) suggest(words ...string) {
	for _, w := range words {
		if harmless(w) && strings.HasPrefix(w, e.begun) {
			fmt.Fprintln(e.stdout, w)
		}
	}
}

// suggestValues suggests the values of an option, each after a prefix.
func (e *env) suggestValues(t *typing, option, prefix, begun string) {
	flag := flagNamed(t.flags, option)
	if flag == nil {
		return
	}
	whole := e.begun
	e.begun = begun
	values := e.valuesOf(t.command, flag)
	e.begun = whole
	for _, v := range values {
		e.suggest(prefix + v)
	}
}

// valuesOf are the values of a command's option; none of one whose values are files or anything.
func (e *env) valuesOf(command string, flag cli.Flag) []string {
	switch name := flag.Names()[0]; name {
	case "color":
		return terminal.Colours
	case "format":
		if command != "pool" {
			return append(vmm.Names(), "json")
		}
	case "force":
		if command != "release" && command != "migrate" {
			return kindNames()
		}
	case "driver":
		return append(namedValues(flag), e.vfioDrivers()...)
	case "from":
		return append(e.pools(), e.selectorsOf(ownWords)...)
	case "eswitch":
		return sriov.EswitchModes()
	case "inline-mode":
		return sriov.InlineModes()
	case "encap":
		return sriov.EncapModes()
	case "mac":
		return []string{sriov.StableMAC}
	case "set":
		return settingWords(e.begun)
	}
	return namedValues(flag)
}

func kindNames() []string {
	var out []string
	for _, k := range holder.Kinds() {
		out = append(out, string(k))
	}
	return out
}

// namedValues are the words that an option's help has for its value, as failover|replug; none if it is of anything.
func namedValues(flag cli.Flag) []string {
	name, _ := flagText(flag)
	return alternatives(name[strings.LastIndex(name, " ")+1:])
}

// alternatives are those words of a|b|NAME that are typed as they stand there, in small letters.
func alternatives(text string) []string {
	return slices.DeleteFunc(strings.Split(text, "|"), func(word string) bool {
		return strings.Trim(word, "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" || strings.Trim(word, ".") == ""
	})
}

// settingWords are the keys of settings, or, of one whose value is begun, its values.
func settingWords(begun string) []string {
	key, _, with := strings.Cut(begun, "=")
	var out []string
	for _, k := range sriov.Keys() {
		if !with {
			out = append(out, string(k)+"=")
		}
	}
	for _, line := range sriov.Help() {
		for word := range strings.FieldsSeq(line[0]) {
			name, value, _ := strings.Cut(word, "=")
			if !with || name != key {
				continue
			}
			if strings.Contains(value, "|") {
				for _, v := range alternatives(value) {
					out = append(out, key+"="+v)
				}
			}
			if strings.Contains(line[1]+value, sriov.StableMAC) {
				out = append(out, key+"="+sriov.StableMAC)
			}
		}
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
	return e.selectorsOn(func(_ *iommu.Host, d *iommu.Device) []string { return f(d) })
}

func (e *env) selectorsOn(f func(*iommu.Host, *iommu.Device) []string) []string {
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
		out = append(out, f(h, d)...)
		return true
	})
	slices.Sort(out)
	return slices.Compact(out)
}

// ownWords are a device's name and its interfaces'.
func ownWords(d *iommu.Device) []string { return append([]string{d.Name}, d.Netdevs...) }

// completeSelectors offers what names a device. What is found by a key is read where that key is typed.
func (e *env) completeSelectors(*cli.Context) {
	key, _, keyed := strings.Cut(e.begun, "=")
	if !keyed {
		e.suggest(e.selectorsOf(func(d *iommu.Device) []string {
			out := append(ownWords(d), vfWords(d)...)
			if d.PCI && e.begun != "" {
				out = append(out, idText(d))
			}
			return out
		})...)
		e.suggest(iommu.Words()...)
		e.suggest("group=", "class=", "mac=", "path=", "serial=", "guid=")
		return
	}

	form, reads := map[string]iommu.Form{
		"mac": iommu.ByMAC, "path": iommu.ByPath, "serial": iommu.BySerial, "guid": iommu.ByGUID,
	}[key]
	e.suggest(e.selectorsOn(func(h *iommu.Host, d *iommu.Device) (out []string) {
		switch {
		case key == "group" && d.Group != nil:
			out = append(out, fmt.Sprintf("group=%d", *d.Group))
		case key == "class" && d.PCI:
			out = append(out, fmt.Sprintf("class=%04x", d.Class>>8))
		case reads:
			// What cannot be read is not offered.
			all, _ := iommu.SelectorsOf(h, d, form)
			for _, s := range all {
				out = append(out, s.String())
			}
		}
		return out
	})...)
}

// vfWords are a VF by its PF's name, or its interfaces'; none of another device.
func vfWords(d *iommu.Device) []string {
	if d.PhysFn == nil {
		return nil
	}
	return []string{fmt.Sprintf("%s/vf%d", d.PhysFn, d.VFIndex)}
}

// completePFs offers PFs, and after those the settings of VFs where a command takes them.
func (e *env) completePFs(*cli.Context) {
	if e.typed.command == "vf create" && e.typed.arguments > 1 {
		e.suggest(settingWords(e.begun)...)
	}
	e.suggest(e.selectorsOf(func(d *iommu.Device) []string {
		if d.SRIOV == nil {
			return nil
		}
		return ownWords(d)
	})...)
}

// completeVFs offers VFs, and after one the settings where a command takes them.
func (e *env) completeVFs(*cli.Context) {
	if e.typed.command == "vf set" && e.typed.arguments > 0 {
		e.suggest(settingWords(e.begun)...)
		return
	}
	e.suggest(e.selectorsOf(func(d *iommu.Device) []string {
		if d.PhysFn == nil {
			return nil
		}
		return append([]string{d.Name}, vfWords(d)...)
	})...)
}

// completeGuests offers the guests that have a lease, as far as they may be known.
func (e *env) completeGuests(*cli.Context) { e.suggest(e.guestNames()...) }

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

// harmless reports whether a name, which may come from a stranger's snapshot, means nothing to a shell.
func harmless(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') &&
			!strings.ContainsRune("._:/@=-", rune(c)) {
			return false
		}
	}
	return true
}
