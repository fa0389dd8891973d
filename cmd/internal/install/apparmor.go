package install

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Confined says what AppArmor's profiles of libvirt's daemons keep from a hook that runs a program, and what to do; ""
// where nothing is known to. They let hooks run what is in the system's own folders, as libvirt itself may
// (src/security/apparmor/usr.sbin.libvirtd.in of libvirt).
func Confined(root, program string) string {
	on, err := os.ReadFile(filepath.Join(root, "/sys/module/apparmor/parameters/enabled"))
	if err != nil || strings.TrimSpace(string(on)) != "Y" {
		return ""
	}
	if slices.Contains([]string{"/bin", "/sbin", "/usr/bin", "/usr/sbin"}, filepath.Dir(program)) {
		return ""
	}
	for _, daemon := range []string{"usr.sbin.libvirtd", "usr.sbin.virtqemud"} {
		profile := filepath.Join("/etc/apparmor.d", daemon)
		text, err := os.ReadFile(filepath.Join(root, profile))
		if err != nil {
			continue
		}
		more := filepath.Join("/etc/apparmor.d/local", daemon)
		// The profile alone may be there.
		local, _ := os.ReadFile(filepath.Join(root, more))
		if !strings.Contains(string(text)+string(local), program) {
			return "AppArmor's " + profile + " keeps libvirt's hooks from running " + program + ": put viaduct into " +
				"/usr/sbin, or add the line \"" + program + " PUx,\" to " + more + " and load it again"
		}
	}
	return ""
}
