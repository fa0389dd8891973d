package bootloader

import (
	"testing"

	"viaduct/internal/host/hosttest"
)

// A parameter is added and removed in the file, and with the command, of what the host boots with.
func TestFind(t *testing.T) {
	const grubFile = "GRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX=\"amd_iommu=off\"\n"
	for name, c := range map[string]struct {
		tree        hosttest.Tree
		add, remove string
	}{
		"nothing": {hosttest.Tree{},
			"add X=on to the kernel's command line, in the settings of this host's boot loader, and reboot",
			"remove amd_iommu=off from the kernel's command line, in the settings of this host's boot loader, and reboot"},
		"Debian": {hosttest.Tree{"etc/default/grub": grubFile, "usr/sbin/update-grub": ""},
			"add X=on to GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` and reboot",
			"remove amd_iommu=off from GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` and reboot"},
		"the other variable": {hosttest.Tree{"etc/default/grub": "# amd_iommu=off was here\nGRUB_CMDLINE_LINUX_DEFAULT='quiet amd_iommu=off'\n" +
			"GRUB_CMDLINE_LINUX=\"amd_iommu=offset\"\n", "usr/sbin/update-grub": ""},
			"add X=on to GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` and reboot",
			"remove amd_iommu=off from GRUB_CMDLINE_LINUX_DEFAULT in /etc/default/grub, run `update-grub` and reboot"},
		"in no file": {hosttest.Tree{"etc/default/grub": "#GRUB_CMDLINE_LINUX=amd_iommu=off\nGRUB_CMDLINE_LINUX=quiet\n", "usr/sbin/update-grub": ""},
			"add X=on to GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` and reboot",
			"remove amd_iommu=off from the kernel's command line (/etc/default/grub does not have it: see the boot loader's own " +
				"configuration), run `update-grub` and reboot"},
		"drop-in": {hosttest.Tree{"etc/default/grub": "", "etc/default/grub.d/vfio.cfg": grubFile,
			"usr/sbin/update-grub": ""},
			"add X=on to GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` and reboot",
			"remove amd_iommu=off from GRUB_CMDLINE_LINUX in /etc/default/grub.d/vfio.cfg, run `update-grub` and reboot"},
		"Fedora": {hosttest.Tree{"etc/default/grub": grubFile, "usr/sbin/grubby": "", "boot/loader/loader.conf": ""},
			"run `grubby --update-kernel=ALL --args=X=on` and reboot",
			"run `grubby --update-kernel=ALL --remove-args=amd_iommu=off` and reboot"},
		"Silverblue": {hosttest.Tree{"run/ostree-booted": "", "etc/default/grub": grubFile, "usr/sbin/grubby": ""},
			"run `rpm-ostree kargs --append=X=on` and reboot",
			"run `rpm-ostree kargs --delete=amd_iommu=off` and reboot"},
		"Pop!_OS": {hosttest.Tree{"usr/bin/kernelstub": "", "boot/efi/loader/loader.conf": ""},
			"run `kernelstub --add-options X=on` and reboot",
			"run `kernelstub --delete-options amd_iommu=off` and reboot"},
		"Arch": {hosttest.Tree{"boot/loader/loader.conf": "",
			"boot/loader/entries/arch.conf": "options root=/dev/sda amd_iommu=off\n"},
			"add X=on to options in /boot/loader/entries/*.conf and reboot",
			"remove amd_iommu=off from options in /boot/loader/entries/arch.conf and reboot"},
		"Proxmox VE": {hosttest.Tree{"etc/kernel/proxmox-boot-uuids": "", "etc/kernel/cmdline": "amd_iommu=off",
			"etc/default/grub": "", "usr/sbin/update-grub": ""},
			"add X=on to /etc/kernel/cmdline, run `proxmox-boot-tool refresh` and reboot",
			"remove amd_iommu=off from /etc/kernel/cmdline, run `proxmox-boot-tool refresh` and reboot"},
		"openSUSE": {hosttest.Tree{"etc/default/grub": grubFile, "usr/sbin/grub2-mkconfig": ""},
			"add X=on to GRUB_CMDLINE_LINUX in /etc/default/grub, run `grub2-mkconfig -o /boot/grub2/grub.cfg` and reboot",
			"remove amd_iommu=off from GRUB_CMDLINE_LINUX in /etc/default/grub, run `grub2-mkconfig -o /boot/grub2/grub.cfg` and reboot"},
	} {
		l := Find(hosttest.NewKernel(t, c.tree).Host())
		if got := l.Add("X=on"); got != c.add {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, c.add)
		}
		if got := l.Remove("amd_iommu=off"); got != c.remove {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, c.remove)
		}
	}
}

// Of a word with more values than the one that is wrong, the others stay.
func TestRemoveValue(t *testing.T) {
	for want, tree := range map[string]hosttest.Tree{
		"change a=x,off to a=x in GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` and reboot": {
			"etc/default/grub": "GRUB_CMDLINE_LINUX=\"a=x,off\"\n", "usr/sbin/update-grub": ""},
		"run `grubby --update-kernel=ALL --remove-args=a=x,off` and `grubby --update-kernel=ALL --args=a=x` and reboot": {
			"etc/default/grub": "", "usr/sbin/grubby": ""},
	} {
		if got := Find(hosttest.NewKernel(t, tree).Host()).RemoveValue("a=x,off", "off"); got != want {
			t.Errorf("%s\nwant\n%s", got, want)
		}
	}
}

// A word that the shell would take apart is quoted.
func TestQuoted(t *testing.T) {
	l := Find(hosttest.NewKernel(t, hosttest.Tree{"etc/default/grub": "", "usr/sbin/grubby": ""}).Host())
	const want = "run `grubby --update-kernel=ALL --remove-args='pci=a;b'` and reboot"
	if got := l.Remove("pci=a;b"); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}
