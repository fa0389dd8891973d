package install

import (
	"errors"
	"os"
	"strings"
)

// Generator is what a host makes its initramfs with.
type Generator int

// The generators.
const (
	NoGenerator Generator = iota
	InitramfsTools
	Dracut
)

// Found is the generator of this host.
func Found() Generator {
	switch {
	case there("/usr/sbin/mkinitramfs"):
		return InitramfsTools
	case there("/usr/bin/dracut"):
		return Dracut
	}
	return NoGenerator
}

func there(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// InInitramfs reports whether a file of an install is part of what an initramfs is made of.
func InInitramfs(file string) bool {
	return strings.HasPrefix(file, initramfsTools) || strings.HasPrefix(file, dracutModule)
}

// Rebuild is the command that makes the initramfs anew, which is left to the user: on some hosts it is signed.
func (g Generator) Rebuild() string {
	return map[Generator]string{InitramfsTools: "update-initramfs -u", Dracut: "dracut --force"}[g]
}

// The devices are named by their place, as addresses move, and overrides are written before any module is loaded: a
// driver that comes then passes them over. vfio-pci takes them in the real root, by viaduct.service.
const takeEarly = `
viaduct_override() {
	for d in /sys/bus/pci/devices/*; do
		real=$(readlink -f "$d")
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

// pattern matches the place of a device (see iommu.PhysicalPath) in sysfs, whatever the bus numbers are.
func pattern(place string) string {
	return "/sys/devices/pci*/" + strings.ReplaceAll(place, "/", "/????:??:")
}

// files are the hook, with what it has to do.
func (g Generator) files(o *Options) ([]File, error) {
	var calls strings.Builder
	for _, place := range o.Initramfs {
		calls.WriteString("viaduct_override '" + pattern(place) + "'\n")
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
	}
	return nil, errors.New("neither initramfs-tools nor dracut is here to hook into")
}
