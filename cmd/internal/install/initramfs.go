package install

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// Generator is what a host makes its initramfs with.
type Generator int

// The generators.
const (
	NoGenerator Generator = iota
	InitramfsTools
	Dracut
	Mkinitcpio
)

// Found is the generator of the host below root.
func Found(root string) Generator {
	switch {
	case there(filepath.Join(root, "/usr/sbin/mkinitramfs")):
		return InitramfsTools
	case there(filepath.Join(root, "/usr/bin/dracut")):
		return Dracut
	case there(filepath.Join(root, "/usr/bin/mkinitcpio")):
		return Mkinitcpio
	}
	return NoGenerator
}

func there(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// InInitramfs reports whether a file of an install is part of what an initramfs is made of.
func InInitramfs(file string) bool {
	return strings.HasPrefix(file, initramfsTools) || strings.HasPrefix(file, dracutModule) ||
		strings.HasPrefix(file, mkinitcpio)
}

// Rebuild is the command that makes the initramfs anew, which is left to the user: on some hosts it is signed.
func (g Generator) Rebuild() string {
	return map[Generator]string{
		InitramfsTools: "update-initramfs -u", Dracut: "dracut --force", Mkinitcpio: "mkinitcpio -P",
	}[g]
}

// The devices are named by their place, as addresses move, and overrides are written before any module is loaded: a
// driver that comes then passes them over. vfio-pci takes them in the real root, by viaduct.service.
const takeEarly = `
viaduct_override() {
	for d in /sys/bus/pci/devices/*; do
		real=$(cd -P "$d" && pwd)
		case $real in
		$1) echo vfio-pci >"$d/driver_override" && echo "<6>viaduct: ${d##*/} is kept for passthrough" >/dev/kmsg ;;
		esac
	done
}
`

const toolsHook = `#!/bin/sh
# ` + marker + `
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
manual_add_modules vfio_pci
`

const toolsScript = `#!/bin/sh
# ` + marker + `
[ "$1" = prereqs ] && exit 0
`

const dracutSetup = `#!/bin/bash
# ` + marker + `
check() { return 0; }
depends() { return 0; }
install() { inst_hook pre-udev 00 "$moddir/viaduct.sh"; }
`

const dracutScript = `#!/bin/sh
# ` + marker + `
`

// An install hook of mkinitcpio(8). With its systemd hook no other hook has a script that runs: a unit does, then.
const initcpioInstall = `#!/bin/bash
# ` + marker + `
build() {
	add_module vfio_pci
	if [[ " ${HOOKS[*]} " == *" systemd "* ]]; then
		add_binary bash
		add_file ` + mkinitcpio + `/viaduct-early.sh /usr/lib/viaduct/early.sh 755
		add_file ` + mkinitcpio + `/viaduct-early.service /usr/lib/systemd/system/viaduct-early.service
		add_symlink /usr/lib/systemd/system/sysinit.target.wants/viaduct-early.service ../viaduct-early.service
	else
		add_runscript
	fi
}
help() { echo "Keeps the devices that viaduct declares with initramfs: true from their own drivers."; }
`

// The early hooks run before any module is loaded.
const initcpioHook = `#!/usr/bin/ash
# ` + marker + `
run_earlyhook() { viaduct_early; }
viaduct_early() {
%s}
`

const initcpioScript = `#!/bin/bash
# ` + marker + `
`

const initcpioUnit = `# ` + marker + `
[Unit]
Description=keeps devices for passthrough from their own drivers
DefaultDependencies=no
Before=systemd-modules-load.service systemd-udev-trigger.service

[Service]
Type=oneshot
ExecStart=/bin/bash /usr/lib/viaduct/early.sh
`

const initcpioConf = `# ` + marker + `
HOOKS+=(viaduct)
`

// pattern matches the folder of a device in sysfs, whatever the numbers of its buses are, and those of domains that
// drivers make (with five digits, as behind Intel's VMD). That of the device on the root bus is as it is: it names it.
func pattern(folder string) string {
	parts := strings.Split(folder, "/")
	root := -1
	for i, part := range parts {
		domain, rest, isDevice := strings.Cut(part, ":")
		bus, function, isFunction := strings.Cut(rest, ":")
		switch {
		case isDevice && !isFunction && strings.HasPrefix(part, "pci"):
			parts[i] = "pci" + digits(strings.TrimPrefix(domain, "pci")) + ":??"
			root = i
		case isFunction && (i != root+1 || len(domain) > 4):
			parts[i] = digits(domain) + ":" + strings.Repeat("?", len(bus)) + ":" + function
		}
	}
	return strings.Join(parts, "/")
}

// digits is a domain, or any where a driver has numbered it.
func digits(domain string) string {
	if len(domain) > 4 {
		return strings.Repeat("?", len(domain))
	}
	return domain
}

// orNothing is the body of a function of a shell, which must not be empty.
func orNothing(body string) string {
	if body == "" {
		return ":\n"
	}
	return body
}

// files are the hook, with what it has to do.
func (g Generator) files(o *Options) ([]File, error) {
	var calls strings.Builder
	for _, folder := range o.Initramfs {
		calls.WriteString("viaduct_override '" + pattern(folder) + "'\n")
	}
	body := takeEarly + calls.String()
	switch g {
	case InitramfsTools:
		return []File{
			{Path: initramfsTools + "/hooks/viaduct", Content: toolsHook, Mode: 0o755},
			{Path: initramfsTools + "/scripts/init-top/000-viaduct", Content: toolsScript + body, Mode: 0o755},
		}, nil
	case Dracut:
		return []File{
			{Path: dracutModule + "/module-setup.sh", Content: dracutSetup, Mode: 0o755},
			{Path: dracutModule + "/viaduct.sh", Content: dracutScript + body, Mode: 0o755},
		}, nil
	case Mkinitcpio:
		inHook := takeEarly + strings.ReplaceAll(initcpioHook, "%s", orNothing(calls.String()))
		return []File{
			{Path: mkinitcpio + "/install/viaduct", Content: initcpioInstall, Mode: 0o755},
			{Path: mkinitcpio + "/hooks/viaduct", Content: inHook, Mode: 0o755},
			{Path: mkinitcpio + "/viaduct-early.sh", Content: initcpioScript + body, Mode: 0o755},
			{Path: mkinitcpio + "/viaduct-early.service", Content: initcpioUnit, Mode: 0o644},
			{Path: "/etc/mkinitcpio.conf.d/viaduct.conf", Content: initcpioConf, Mode: 0o644},
		}, nil
	}
	return nil, errors.New("no initramfs-tools, dracut or mkinitcpio is here to hook into")
}
