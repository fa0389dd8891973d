package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// packages builds both packages of two versions.
func packages(t *testing.T) (first, second string) {
	t.Helper()
	first, second = t.TempDir(), t.TempDir()
	for version, out := range map[string]string{"1.0.0": first, "1.1.0": second} {
		if err := run(version, "amd64", out); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(first, "viaduct_1.0.0_amd64.deb"), filepath.Join(second, "viaduct_1.1.0_amd64.deb")
}

// script is what happens to the packages in a Debian system: they are installed, used, upgraded, removed and purged.
const script = `set -e
say() { echo "--- $*"; }
there() { for f; do [ -e "$f" ] || { echo "$f is missing"; exit 1; }; done; }
gone() { for f; do [ ! -e "$f" ] && [ ! -L "$f" ] || { echo "$f is still there"; exit 1; }; done; }
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
units=/usr/lib/systemd/system
files="/usr/sbin/viaduct $units/viaduct.service $units/viaduct-watch.service /usr/lib/udev/rules.d/72-viaduct.rules
	/usr/share/man/man8/viaduct.8.gz /usr/share/man/man5/host.yaml.5.gz /usr/share/bash-completion/completions/viaduct
	/usr/share/doc/viaduct/examples/host.yaml"

say install
dpkg -i /first.deb
there $files
viaduct version | grep '^viaduct 1.0.0 (commit'
gone /etc/systemd/system/multi-user.target.wants/viaduct.service
viaduct help gpu >/dev/null

say use
cp /usr/share/doc/viaduct/examples/host.yaml /etc/viaduct/host.yaml
echo '# mine' >>/etc/viaduct/host.yaml
mkdir -p /etc/systemd/system/multi-user.target.wants /var/lib/viaduct
for unit in viaduct.service viaduct-watch.service; do
	ln -s $units/$unit /etc/systemd/system/multi-user.target.wants/
done

say upgrade
dpkg -i /second.deb
there $files /etc/systemd/system/multi-user.target.wants/viaduct.service
viaduct version | grep '^viaduct 1.1.0 '
grep -q '# mine' /etc/viaduct/host.yaml

say remove
dpkg -r viaduct
gone $files /etc/systemd/system/multi-user.target.wants/viaduct.service \
	/etc/systemd/system/multi-user.target.wants/viaduct-watch.service
grep -q '# mine' /etc/viaduct/host.yaml
there /var/lib/viaduct

say install again
dpkg -i /second.deb
grep -q '# mine' /etc/viaduct/host.yaml

say purge
dpkg -P viaduct
gone $files /etc/viaduct /var/lib/viaduct
dpkg -l viaduct 2>/dev/null | grep -q '^[hi]' && exit 1
say done
`

// The .deb is installed, upgraded, removed and purged in a Debian system: what the user wrote is kept until the purge.
func TestDeb(t *testing.T) {
	lab, err := exec.Command("../lab", "path").Output()
	system := filepath.Join(strings.TrimSpace(string(lab)), "root")
	switch {
	case err != nil:
		t.Fatal(err)
	case os.Getuid() != 0:
		t.Skip("a chroot takes root")
	}
	if _, err := os.Stat(filepath.Join(system, "usr/bin/dpkg")); err != nil {
		t.Skipf("there is no Debian system (hack/lab build makes one): %v", err)
	}
	first, second := packages(t)

	// Nothing is written to the system itself.
	dir := t.TempDir()
	for _, name := range []string{"up", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	over := "lowerdir=" + system + ",upperdir=" + dir + "/up,workdir=" + dir + "/work"
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "sh", "-ec", `mount -t overlay overlay -o "$1" "$2"
cp "$3" "$2/first.deb"
cp "$4" "$2/second.deb"
exec chroot "$2" sh -c "$5"`, "sh", over, dir+"/root", first, second, script)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive"}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.HasSuffix(out, []byte("--- done\n")) {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// rpm reads the .rpm: its files, and what it runs.
func TestRPM(t *testing.T) {
	rpm, err := exec.LookPath("rpm")
	if err != nil {
		t.Skip("there is no rpm here")
	}
	out := t.TempDir()
	if err := run("1.0.0", "amd64", out); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(out, "*.rpm"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%q, %v", files, err)
	}
	said, err := exec.Command(rpm, "-qp", "--list", "--scripts", "--requires", files[0]).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	for _, want := range []string{
		"/usr/sbin/viaduct\n", "/usr/lib/systemd/system/viaduct.service\n", "/usr/share/zsh/site-functions/_viaduct\n",
		"/usr/share/man/man8/viaduct.8.gz\n", "viaduct uninstall", "systemctl daemon-reload", "kmod\n",
	} {
		if !strings.Contains(string(said), want) {
			t.Errorf("%q is missing:\n%s", want, said)
		}
	}
}
