// Package install puts viaduct into a host's boot: systemd units, and a hook for the initramfs.
package install

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/declared"
	"viaduct/internal/host"
	"viaduct/internal/shell"
)

// Options are what is installed.
type Options struct {
	Program   string   // absolute path of viaduct
	Watch     bool     // a service that keeps the host as declared
	Late      bool     // a second unit, when the network is up, for what waits for a bond
	Libvirt   bool     // a hook that checks, takes and scrubs what domains have
	Initramfs []string // folders in sysfs of what the initramfs keeps for passthrough; nil for no hook
	Units     string   // folder of the units that a package has brought; "" if none has
}

// Where a host keeps such things.
const (
	units  = "/etc/systemd/system"
	wanted = units + "/multi-user.target.wants"

	initramfsTools = "/etc/initramfs-tools"
	dracutModule   = "/usr/lib/dracut/modules.d/91viaduct"
	mkinitcpio     = "/etc/initcpio"

	// HotplugPath is the unit that looks for devices that came later.
	HotplugPath = "viaduct-hotplug.path"

	ruleName    = "72-viaduct.rules"
	networkName = "05-viaduct.network"

	// LibvirtHook is the hook that libvirt runs for each QEMU domain.
	LibvirtHook = "/etc/libvirt/hooks/qemu.d/viaduct"
	// What it runs for each network, which says what a domain draws and gives back, also while it runs.
	networkHook = "/etc/libvirt/hooks/network.d/viaduct"
)

const marker = "Written by viaduct install; viaduct uninstall removes it."

// What the services may not do. They load modules, write to /sys, read every process's open files, enter network
// namespaces and hand out nodes of devices: so /sys and /dev stay as they are, and no process is hidden.
const hardened = `NoNewPrivileges=yes
ProtectSystem=full
ProtectHome=read-only
ProtectHostname=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=net
RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET AF_INET6
SystemCallArchitectures=native
KeyringMode=private
`

// The early unit does everything, before anybody else looks at network interfaces or starts guests. It orders itself,
// as the default dependencies would put it behind what has to wait for it.
const early = `# ` + marker + `
[Unit]
Description=SR-IOV virtual functions and passthrough devices as declared
Documentation=man:viaduct(8)
DefaultDependencies=no
RequiresMountsFor=/etc/viaduct %s
After=local-fs.target systemd-udevd.service systemd-udev-trigger.service systemd-modules-load.service systemd-remount-fs.service
Wants=network-pre.target
Before=network-pre.target libvirtd.service virtqemud.service libvirt-guests.service machines.target kubelet.service podman.service
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStartPre=-/bin/rm -f ` + mark + `
ExecStart=%s apply --boot
TimeoutStartSec=30min
` + hardened + `
[Install]
WantedBy=multi-user.target
`

// The late unit does what waits for a bond that others make.
const late = `# ` + marker + `
[Unit]
Description=SR-IOV virtual functions of bonded ports as declared
Documentation=man:viaduct(8)
After=viaduct.service network-online.target
Wants=network-online.target
Before=libvirtd.service virtqemud.service libvirt-guests.service kubelet.service podman.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=%s apply --boot --late
TimeoutStartSec=30min
` + hardened + `
[Install]
WantedBy=multi-user.target
`

const watch = `# ` + marker + `
[Unit]
Description=keeps SR-IOV virtual functions and passthrough devices as declared
Documentation=man:viaduct(8)
After=viaduct.service

[Service]
ExecStart=%s watch
Restart=on-failure
RestartSec=5
` + hardened + `
[Install]
WantedBy=multi-user.target
`

// A device that comes later leaves a mark, by which the unit runs that brings it to what is declared: any that is
// neither a VF nor a bridge, and a PF again when it has its interface. More than the mark the rule does not make, as
// udev waits for what a rule runs, and kills it. The mark is there until a run that begins later takes it away, so that
// none is lost while one ends (systemd.path(5)).
const (
	mark = "/run/viaduct-hotplug"
	rule = `# ` + marker + `
ACTION!="add", GOTO="viaduct_end"
SUBSYSTEM=="pci", ATTR{class}!="0x06*", TEST!="physfn", RUN+="/bin/sh -c '>>` + mark + `'"
SUBSYSTEM=="net|nvme", ATTRS{sriov_totalvfs}=="?*", RUN+="/bin/sh -c '>>` + mark + `'"
LABEL="viaduct_end"
` + declared.UnmanagedRule
	networkd = "# " + marker + "\n" + declared.UnmanagedNetwork
)

const hotplugPath = `# ` + marker + `
[Unit]
Description=looks for devices that came later
Documentation=man:viaduct(8)
After=viaduct.service

[Path]
PathExists=` + mark + `
TriggerLimitIntervalSec=0

[Install]
WantedBy=multi-user.target
`

const hotplug = `# ` + marker + `
[Unit]
Description=brings a device that came later to what is declared
Documentation=man:viaduct(8)
After=viaduct.service
StartLimitIntervalSec=0

[Service]
Type=oneshot
ExecStartPre=/bin/rm -f ` + mark + `
ExecStart=%s watch --once
TimeoutStartSec=30min
` + hardened

// A hook of libvirt's (docs/hooks.rst there; the folder since 6.5). What it is called for, and what it refuses, is the
// program's.
const libvirtHook = `#!/bin/sh
# ` + marker + `
exec %s libvirt-hook%s -- "$@"
`

// File is one file of the host, or a link.
type File struct {
	Path    string
	Content string
	Link    string // to this, instead of a content
	Mode    fs.FileMode
}

// unit is a unit that an install may have.
type unit struct {
	name, text string
	enabled    bool // by itself: the others are started by something
	wanted     func(*Options) bool
}

var always = func(*Options) bool { return true }

var allUnits = [...]unit{
	{"viaduct.service", early, true, always},
	{HotplugPath, hotplugPath, true, always},
	{"viaduct-hotplug.service", hotplug, false, always},
	{"viaduct-late.service", late, true, func(o *Options) bool { return o.Late }},
	{"viaduct-watch.service", watch, true, func(o *Options) bool { return o.Watch }},
}

// file is the unit in a folder, for a program.
func (u *unit) file(folder, program string) File {
	return File{Path: filepath.Join(folder, u.name), Content: strings.ReplaceAll(u.text, "%s", inUnit(program)),
		Mode: 0o644}
}

// Files are what the options come to.
func (o *Options) Files(initramfs Generator) ([]File, error) {
	var all []File
	folder := cmp.Or(o.Units, units)
	for i := range allUnits {
		u := &allUnits[i]
		if !u.wanted(o) {
			continue
		}
		if o.Units == "" {
			all = append(all, u.file(folder, o.Program))
		}
		if u.enabled {
			all = append(all, File{Path: filepath.Join(wanted, u.name), Link: filepath.Join(folder, u.name)})
		}
	}

	if o.Units == "" {
		all = append(all, File{Path: "/etc/udev/rules.d/" + ruleName, Content: rule, Mode: 0o644},
			File{Path: "/etc/systemd/network/" + networkName, Content: networkd, Mode: 0o644})
	}

	if o.Libvirt {
		for _, hook := range [][2]string{{LibvirtHook, ""}, {networkHook, " --network"}} {
			content := fmt.Sprintf(libvirtHook, shell.Quote(o.Program), hook[1])
			all = append(all, File{Path: hook[0], Content: content, Mode: 0o755})
		}
	}

	if o.Initramfs != nil {
		more, err := initramfs.files(o)
		if err != nil {
			return nil, err
		}
		all = append(all, more...)
	}

	return all, nil
}

// everything is all that any options come to, for what an earlier install left.
func everything() []File {
	o := Options{Program: "/", Watch: true, Late: true, Libvirt: true, Initramfs: []string{}}
	var all []File
	for _, g := range []Generator{InitramfsTools, Dracut, Mkinitcpio} {
		files, _ := o.Files(g)
		all = append(all, slices.DeleteFunc(files, func(f File) bool { return slices.Contains(paths(all), f.Path) })...)
	}
	return all
}

// Write makes the files below root, and removes those of an earlier install that are not among them, unless something
// stands in the way of one of them: then it changes nothing. It returns what it changed.
func Write(root string, files []File) (changed []string, err error) {
	written, removed, err := changes(root, files)
	if err != nil {
		return nil, err
	}
	for _, f := range removed {
		if err := os.Remove(filepath.Join(root, f.Path)); err != nil {
			return changed, err
		}
		changed = append(changed, f.Path)
	}
	for _, f := range written {
		if err := f.write(root); err != nil {
			return changed, err
		}
		changed = append(changed, f.Path)
	}
	return changed, nil
}

// Changes are what Write would write below root, and what it would remove, or why it would change nothing.
func Changes(root string, files []File) (written, removed []string, err error) {
	w, r, err := changes(root, files)
	return paths(w), paths(r), err
}

func changes(root string, files []File) (written, removed []File, err error) {
	for _, old := range obsolete(files) {
		left, err := old.isOurs(root)
		if err != nil {
			return nil, nil, err
		}
		if left {
			removed = append(removed, old)
		}
	}
	for _, f := range files {
		differs, err := f.differs(root)
		if err != nil {
			return nil, nil, err
		}
		if differs {
			written = append(written, f)
		}
	}
	return written, removed, nil
}

func paths(files []File) (out []string) {
	for _, f := range files {
		out = append(out, f.Path)
	}
	return out
}

// obsolete are the files of any install that are not among these.
func obsolete(files []File) []File {
	return slices.DeleteFunc(everything(), func(old File) bool {
		return slices.ContainsFunc(files, func(f File) bool { return f.Path == old.Path })
	})
}

// differs reports whether the file is to be written. What is there and no file of an install is an error.
func (f *File) differs(root string) (bool, error) {
	have, ours, err := f.read(root)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return true, nil
	case err != nil:
		return false, err
	case !ours:
		return false, fmt.Errorf("%s exists, and viaduct install did not write it: move it away first", f.Path)
	case f.Link != "" || have != f.Content:
		return have != f.Link+f.Content, nil
	}
	st, err := os.Stat(filepath.Join(root, f.Path))
	return err == nil && st.Mode().Perm() != f.Mode, err
}

// read is what is where the file is to be: its content, or where its link leads, and whether an install may have
// written that.
func (f *File) read(root string) (have string, ours bool, err error) {
	file := filepath.Join(root, f.Path)
	if f.Link != "" {
		have, err = os.Readlink(file)
		if errors.Is(err, unix.EINVAL) {
			return "", false, nil
		}
		return have, true, err
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, unix.EISDIR) {
		return "", false, nil
	}
	return string(text), strings.Contains(string(text), marker), err
}

// isOurs reports whether a file of an install is there.
func (f *File) isOurs(root string) (bool, error) {
	_, ours, err := f.read(root)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	return ours, err
}

func (f *File) write(root string) error {
	file := filepath.Join(root, f.Path)
	if f.Link == "" {
		if err := host.WriteFile(file, []byte(f.Content)); err != nil {
			return err
		}
		return os.Chmod(file, f.Mode)
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.Symlink(f.Link, file))
}

// Remove removes all that any install made below root, and returns what was there.
func Remove(root string) (changed []string, err error) {
	for _, f := range everything() {
		ours, err := f.isOurs(root)
		if err == nil && ours {
			err = os.Remove(filepath.Join(root, f.Path))
		}
		if err != nil {
			return changed, err
		}
		if ours {
			changed = append(changed, f.Path)
		}
	}
	return changed, nil
}

// Watches reports whether the service that watches is installed below root.
func Watches(root string) bool {
	_, err := os.Lstat(filepath.Join(root, wanted, "viaduct-watch.service"))
	return err == nil
}
