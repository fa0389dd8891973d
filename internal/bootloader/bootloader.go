// Package bootloader knows how the kernel's command line of a host is changed, by what the host boots with.
package bootloader

import (
	"maps"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/internal/shell"
)

// Loader is how a host's command line is changed. Its zero value is a way that is not known.
type Loader struct {
	Name string // e.g. "GRUB"; "" if it is not known
	// file has the command line, in a setting of it; command then puts it in force. Where a program does both, add and
	// remove are its command lines, in which PARAMETER stands for the parameter.
	file, setting, command string
	add, remove            string
	texts                  map[string]string // of files that may have parameters, by name
}

// A kind is a way to boot that is known by the files it has: all of them have to be there.
type kind struct {
	signs []string
	Loader
}

// kinds are in the order in which they are looked for: what a distribution adds of its own comes before what it adds
// to.
var kinds = []kind{
	{[]string{"run/ostree-booted"}, Loader{
		Name: "rpm-ostree", add: "rpm-ostree kargs --append=PARAMETER", remove: "rpm-ostree kargs --delete=PARAMETER",
	}},
	{[]string{"etc/NIXOS"}, Loader{
		Name: "NixOS", file: "/etc/nixos/configuration.nix", setting: "boot.kernelParams",
		command: "nixos-rebuild boot",
	}},
	{[]string{"usr/bin/kernelstub"}, Loader{
		Name: "kernelstub", add: "kernelstub --add-options PARAMETER", remove: "kernelstub --delete-options PARAMETER",
	}},
	{[]string{"etc/kernel/proxmox-boot-uuids", "etc/kernel/cmdline"}, Loader{
		Name: "proxmox-boot-tool", file: "/etc/kernel/cmdline", command: "proxmox-boot-tool refresh",
	}},
	{[]string{"usr/sbin/grubby", "etc/default/grub"}, Loader{
		Name: "GRUB", add: "grubby --update-kernel=ALL --args=PARAMETER",
		remove: "grubby --update-kernel=ALL --remove-args=PARAMETER",
	}},
	{[]string{"etc/default/grub", "usr/sbin/update-grub"}, grub("update-grub")},
	{[]string{"etc/default/grub", "usr/sbin/grub2-mkconfig"}, grub("grub2-mkconfig -o /boot/grub2/grub.cfg")},
	{[]string{"etc/default/grub", "usr/bin/grub-mkconfig"}, grub("grub-mkconfig -o /boot/grub/grub.cfg")},
	{[]string{"etc/default/grub", "boot/grub/grub.cfg"}, grub("grub-mkconfig -o /boot/grub/grub.cfg")},
	{[]string{"boot/limine.conf"}, Loader{Name: "Limine", file: "/boot/limine.conf", setting: "cmdline"}},
	{[]string{"etc/kernel/cmdline", "usr/bin/mkinitcpio"}, Loader{
		Name: "systemd-boot", file: "/etc/kernel/cmdline", command: "mkinitcpio -P",
	}},
	{[]string{"etc/kernel/cmdline", "usr/bin/kernel-install"}, Loader{
		Name: "systemd-boot", file: "/etc/kernel/cmdline", command: "kernel-install add-all",
	}},
	{[]string{"boot/loader/loader.conf"}, entries("/boot")},
	{[]string{"efi/loader/loader.conf"}, entries("/efi")},
	{[]string{"boot/efi/loader/loader.conf"}, entries("/boot/efi")},
	{[]string{"boot/firmware/cmdline.txt"}, Loader{Name: "the Raspberry Pi's", file: "/boot/firmware/cmdline.txt"}},
	{[]string{"boot/refind_linux.conf"}, Loader{Name: "rEFInd", file: "/boot/refind_linux.conf"}},
	{[]string{"boot/extlinux/extlinux.conf"}, Loader{
		Name: "extlinux", file: "/boot/extlinux/extlinux.conf", setting: "APPEND",
	}},
	{[]string{"boot/syslinux/syslinux.cfg"}, Loader{
		Name: "syslinux", file: "/boot/syslinux/syslinux.cfg", setting: "append",
	}},
}

func grub(command string) Loader {
	return Loader{Name: "GRUB", file: "/etc/default/grub", setting: "GRUB_CMDLINE_LINUX", command: command}
}

func entries(at string) Loader {
	return Loader{Name: "systemd-boot", file: at + "/loader/entries/*.conf", setting: "options"}
}

// Signs are the files, other than those of [Files], by which Find goes, whatever is in them.
func Signs() []string {
	var out []string
	for _, k := range kinds {
		for _, s := range k.signs {
			if !slices.Contains(out, s) && !slices.Contains(settings, s) {
				out = append(out, s)
			}
		}
	}
	return out
}

// settings are files of which the content counts too.
var settings = []string{"etc/default/grub", "etc/kernel/cmdline"}

// Files are the files in which a parameter may stand that are there.
func Files(h *host.Host) []string {
	out := slices.Clone(settings)
	for _, dir := range []string{"etc/default/grub.d", "boot/loader/entries", "efi/loader/entries"} {
		names, err := h.Names(dir)
		if err != nil {
			continue
		}
		for _, n := range names {
			if strings.HasSuffix(n, ".cfg") || strings.HasSuffix(n, ".conf") {
				out = append(out, path.Join(dir, n))
			}
		}
	}
	return slices.DeleteFunc(out, func(name string) bool { return !h.Exists(name) })
}

// Find finds how this host's command line is changed.
func Find(h *host.Host) Loader {
	for _, k := range kinds {
		if slices.ContainsFunc(k.signs, func(name string) bool { return !h.Exists(name) }) {
			continue
		}
		l := k.Loader
		l.texts = map[string]string{}
		for _, name := range Files(h) {
			if b, err := h.Read(name); err == nil {
				l.texts["/"+name] = string(b)
			}
		}
		return l
	}
	return Loader{}
}

// Add says how a parameter comes onto the command line.
func (l Loader) Add(parameter string) string {
	switch {
	case l.add != "":
		return "run `" + with(l.add, parameter) + "` and reboot"
	case l.file == "":
		return "add " + parameter + " to the kernel's command line, in the settings of this host's boot loader, and " +
			"reboot"
	}
	return "add " + parameter + " to " + l.place() + l.inForce()
}

// Remove says how a word that is on the command line goes.
func (l Loader) Remove(word string) string { return l.change(word, "") }

// RemoveValue says how a value goes that stands in a word of the command line, alone or with others: in "a=x,off".
func (l Loader) RemoveValue(word, value string) string {
	name, values, _ := strings.Cut(word, "=")
	others := slices.DeleteFunc(strings.Split(values, ","), func(v string) bool { return v == value })
	if len(others) == 0 {
		return l.Remove(word)
	}
	return l.change(word, name+"="+strings.Join(others, ","))
}

// change says how a word is changed to another, or goes if that is "".
func (l Loader) change(word, rest string) string {
	switch {
	case l.remove != "":
		commands := "`" + with(l.remove, word) + "`"
		if rest != "" {
			commands += " and `" + with(l.add, rest) + "`"
		}
		return "run " + commands + " and reboot"
	case l.file == "":
		return changing(word, rest) + " the kernel's command line, in the settings of this host's boot loader, and " +
			"reboot"
	}

	place, looked := l.holding(word)
	switch {
	case place != "":
	case looked:
		return changing(word, rest) + " the kernel's command line (" + l.file + " does not have it: see the boot " +
			"loader's own configuration)" + l.inForce()
	default:
		place = l.place()
	}
	return changing(word, rest) + " " + place + l.inForce()
}

// with is a command with a parameter in it, quoted for the shell.
func with(command, parameter string) string {
	return strings.ReplaceAll(command, "PARAMETER", shell.Quote(parameter))
}

func changing(word, rest string) string {
	if rest == "" {
		return "remove " + word + " from"
	}
	return "change " + word + " to " + rest + " in"
}

// holding is where a word of the command line stands, with the name of the setting: "" if it is in none of the files;
// looked is false if the loader's own file was not read.
func (l Loader) holding(word string) (place string, looked bool) {
	for _, name := range slices.Sorted(maps.Keys(l.texts)) {
		looked = looked || name == l.file || strings.HasPrefix(name, path.Dir(l.file)+"/")
		for line := range strings.Lines(l.texts[name]) {
			line, _, _ = strings.Cut(line, "#")
			setting, words, is := strings.Cut(strings.TrimSpace(line), "=")
			if shell := is && strings.HasPrefix(name, "/etc/default/"); !shell {
				setting, words = "", line
			}

			words = strings.Map(func(r rune) rune {
				if r == '"' || r == '\'' {
					return ' '
				}
				return r
			}, words)
			switch fields := strings.Fields(words); {
			case !slices.Contains(fields, word):
				continue
			case setting != "":
				return setting + " in " + name, true
			case fields[0] == l.setting:
				return l.setting + " in " + name, true
			}
			return name, true
		}
	}
	return "", looked
}

// place is where the command line is.
func (l Loader) place() string {
	if l.setting == "" {
		return l.file
	}
	return l.setting + " in " + l.file
}

func (l Loader) inForce() string {
	if l.command == "" {
		return " and reboot"
	}
	return ", run `" + l.command + "` and reboot"
}
