package hostfile

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// What is done as root is read only from where root alone can write, and from no pipe.
func TestTrustedFiles(t *testing.T) {
	const dropIn = Dir + "/10-more.yaml"
	for what, c := range map[string]struct {
		key   string // of the file or folder
		owner host.Owner
		says  string
	}{
		"root's": {"viaduct/host.yaml", host.Owner{Mode: 0o644}, ""},
		"for all to write": {"viaduct/host.yaml", host.Owner{Mode: 0o666},
			"may write /etc/viaduct/host.yaml"},
		"a user's":            {"viaduct/host.yaml", host.Owner{UID: 1000, Mode: 0o644}, "owner 1000"},
		"with a list":         {"viaduct/host.yaml", host.Owner{Mode: 0o644, ACL: true}, "setfacl"},
		"in a folder for all": {"viaduct/host.d", host.Owner{Mode: 0o777}, "may write /etc/viaduct/host.d"},
		"a drop-in of a group": {"host.d/10-more.yaml", host.Owner{GID: 5, Mode: 0o664},
			"may write /etc/viaduct/host.d/10"},
		"below a folder of a user's": {"etc/viaduct", host.Owner{UID: 1000, Mode: 0o755},
			"may write /etc/viaduct (owner"},
	} {
		k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0")
		for _, f := range []string{File, dropIn} {
			full := filepath.Join(k.Dir(), f)
			err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755),
				os.WriteFile(full, []byte("protect: [\"0000:09:00.0\"]\n"), 0o600))
			if err != nil {
				t.Fatal(err)
			}
		}
		k.Owners[c.key] = c.owner
		s, err := Load(&iommu.Host{Host: k.Host()})
		if c.says == "" && (err != nil || len(s.Protect) != 2) || c.says != "" &&
			(err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v", what, err)
		}
	}

	k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0")
	pipe := filepath.Join(k.Dir(), File)
	if err := errors.Join(os.MkdirAll(filepath.Dir(pipe), 0o755), syscall.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(&iommu.Host{Host: k.Host()}); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a pipe: %v", err)
	}
}
