package host_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
)

// answers is what a directory says of a name, in all ways of asking.
type answers struct {
	read, text, link, base string
	number                 int
	names                  []string
	exists                 bool
	errs                   [6]error // the errno of Read, String, Link, LinkBase, Int, Names
}

func errnoOf(err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[unix.Errno](err); ok {
		return e
	}
	return errors.New("no errno")
}

func ask(d *host.Dir, name string) answers {
	var a answers
	b, err := d.Read(name)
	a.read, a.errs[0] = string(b), errnoOf(err)
	a.text, err = d.String(name)
	a.errs[1] = errnoOf(err)
	a.link, err = d.Link(name)
	a.errs[2] = errnoOf(err)
	if a.base, err = d.LinkBase(name); err != nil {
		a.base = ""
	}
	a.errs[3] = errnoOf(err)
	a.number, err = d.Int(name)
	a.errs[4] = errnoOf(err)
	a.names, err = d.Names(name)
	a.errs[5] = errnoOf(err)
	if len(a.names) == 0 {
		a.names = nil
	}
	a.exists = d.Exists(name)
	return a
}

var sample = hosttest.Tree{
	"sys/bus/dev":                    "-> ../devices/root/dev",
	"sys/bus/dangling":               "-> ../devices/gone",
	"sys/bus/loop":                   "-> loop",
	"sys/devices/root/up":            "1\n",
	"sys/devices/root/dev/id":        "0x8086\n",
	"sys/devices/root/dev/number":    "-1\n",
	"sys/devices/root/dev/lines":     "a\nb\n\n",
	"sys/devices/root/dev/empty":     "",
	"sys/devices/root/dev/big":       strings.Repeat("0123456789abcde\n", 257),
	"sys/devices/root/dev/page":      strings.Repeat("x", 4096),
	"sys/devices/root/dev/none/":     "",
	"sys/devices/root/dev/subsystem": "-> ../../../class/net",
	"sys/class/net/":                 "",
}

func TestAnswers(t *testing.T) {
	text := func(s string, number int, bad bool) answers {
		a := answers{read: s, text: strings.TrimSuffix(s, "\n"), number: number, exists: true}
		a.errs = [6]error{nil, nil, unix.EINVAL, unix.EINVAL, nil, unix.ENOTDIR}
		if bad {
			a.errs[4] = errors.New("no errno")
		}
		return a
	}

	none := func(e unix.Errno, exists bool) answers {
		return answers{errs: [6]error{e, e, e, e, e, e}, exists: exists}
	}

	dir := func(names ...string) answers {
		return answers{
			names:  names,
			exists: true,
			errs:   [6]error{unix.EISDIR, unix.EISDIR, unix.EINVAL, unix.EINVAL, unix.EISDIR, nil},
		}
	}

	link := func(target, base string, to answers) answers {
		to.link, to.base, to.errs[2], to.errs[3], to.exists = target, base, nil, nil, true
		return to
	}

	want := map[string]answers{
		"sys/bus/dev/id":                 text("0x8086\n", 0x8086, false),
		"sys/devices/root/dev/number":    text("-1\n", -1, false),
		"sys/devices/root/dev/lines":     text("a\nb\n\n", 0, true),
		"sys/devices/root/dev/empty":     text("", 0, true),
		"sys/devices/root/dev/big":       text(sample["sys/devices/root/dev/big"], 0, true),
		"sys/devices/root/dev/page":      text(sample["sys/devices/root/dev/page"], 0, true),
		"sys/devices/root/dev/none":      dir(),
		"sys/devices/root/dev/subsystem": link("../../../class/net", "net", dir()),
		"sys/bus":                        dir("dangling", "dev", "loop"),
		".":                              dir("sys"),
		"sys/bus/dev": link("../devices/root/dev", "dev",
			dir("big", "empty", "id", "lines", "none", "number", "page", "subsystem")),
		"sys/bus/dangling":     link("../devices/gone", "gone", none(unix.ENOENT, true)),
		"sys/bus/loop":         link("loop", "loop", none(unix.ELOOP, true)),
		"sys/bus/loop/x":       none(unix.ELOOP, false),
		"sys/bus/dangling/x":   none(unix.ENOENT, false),
		"sys/bus/nothing":      none(unix.ENOENT, false),
		"sys/bus/dev/id/x":     none(unix.ENOTDIR, false),
		"../../sys/bus/dev/id": text("0x8086\n", 0x8086, false),
	}

	for kind, h := range sample.Hosts(t) {
		for name, want := range want {
			if got := ask(&h.Dir, name); !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %s:\ngot  %+v\nwant %+v", kind, name, got, want)
			}
		}
		if h.Live() {
			t.Errorf("%s is live", kind)
		}
	}
}

func TestOpenDir(t *testing.T) {
	for kind, h := range sample.Hosts(t) {
		d, err := h.Open("sys/bus/dev")
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		if got, err := d.String("id"); got != "0x8086" || err != nil {
			t.Errorf("%s: id is %q, %v", kind, got, err)
		}
		if got, err := d.LinkBase("subsystem"); got != "net" || err != nil {
			t.Errorf("%s: subsystem is %q, %v", kind, got, err)
		}
		below, err := d.Open("none")
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		if err := errors.Join(below.Close(), d.Close(), d.Close()); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		for name, want := range map[string]error{"sys/bus/dangling": unix.ENOENT, "sys/bus/dev/id": unix.ENOTDIR,
			"sys/bus/loop": unix.ELOOP} {
			if _, err := h.Open(name); !errors.Is(err, want) {
				t.Errorf("%s: %s: %v, want %v", kind, name, err, want)
			}
		}
	}
}

// TestErrors looks at the errors themselves: the type, the operation, the whole path, the errno.
func TestErrors(t *testing.T) {
	dir, file := sample.Dir(t), sample.Snapshot(t)
	for name, root := range map[string]string{dir: dir, file: file + ":"} {
		h, err := host.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		d, err := h.Open("sys/bus")
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		ops := map[string]func(*host.Dir, string) error{
			"read":     func(d *host.Dir, n string) error { _, err := d.Read(n); return err },
			"readlink": func(d *host.Dir, n string) error { _, err := d.Link(n); return err },
			"readdir":  func(d *host.Dir, n string) error { _, err := d.Names(n); return err },
			"open":     func(d *host.Dir, n string) error { _, err := d.Open(n); return err },
		}
		for op, f := range ops {
			err := f(d, "gone/x")
			want := &fs.PathError{Op: op, Path: root + "/sys/bus/gone/x", Err: unix.ENOENT}
			if got, ok := errors.AsType[*fs.PathError](err); !ok || !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %#v, want %#v", op, err, want)
			}
			if !errors.Is(err, fs.ErrNotExist) || !host.Absent(err) {
				t.Errorf("%s: %v is not ErrNotExist", op, err)
			}
		}
		for _, n := range []string{"dev/id", "gone", "../../etc/x"} {
			if err := d.Write(n, "1"); !errors.Is(err, unix.EROFS) || !errors.Is(err, host.ErrReadOnly) {
				t.Errorf("write %s: %v, want EROFS", n, err)
			}
		}
		if got, want := d.Path("dev"), root+"/sys/bus/dev"; got != want {
			t.Errorf("path %q, want %q", got, want)
		}
	}

	if _, err := host.Open(dir + "/gone"); !errors.Is(err, fs.ErrNotExist) ||
		!strings.Contains(err.Error(), dir+"/gone") {
		t.Errorf("open of nothing: %v", err)
	}
}

func TestAbsent(t *testing.T) {
	for err, want := range map[error]bool{
		unix.ENOENT: true, unix.ENODEV: true, unix.ENXIO: true, unix.EACCES: false, unix.ENOTDIR: false,
		unix.EIO:       false,
		fs.ErrNotExist: true, &fs.PathError{Err: unix.ENODEV}: true,
	} {
		if host.Absent(err) != want {
			t.Errorf("%v: %v", err, !want)
		}
	}
	if host.Absent(nil) {
		t.Error("no error is not absence")
	}
}

// TestConfined: nothing in a captured tree, however it is linked, shows a file of the host it is looked at on.
func TestConfined(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}

	up := strings.Repeat("../", 20)
	tree := hosttest.Tree{
		"sys/abs":            "-> " + outside + "/secret",
		"sys/absdir":         "-> " + outside,
		"sys/climb":          "-> " + up + outside[1:] + "/secret",
		"sys/climbdir":       "-> " + up + outside[1:],
		"sys/root":           "-> /",
		"sys/chain":          "-> absdir/../" + filepath.Base(outside) + "/secret",
		"sys/hostname":       "-> /etc/hostname",
		"sys/magic":          "-> /proc/self/root",
		"etc/hostname":       "captured\n",
		"sys/bus/own":        "-> /etc/hostname",
		"sys/bus/deep/climb": "-> " + up + "etc/hostname",
	}

	h := tree.Host(t)
	for _, n := range []string{
		"sys/abs", "sys/absdir/secret", "sys/climb", "sys/climbdir/secret", "sys/root" + outside + "/secret",
		"sys/chain",
		outside + "/secret", up + outside[1:] + "/secret", "sys/magic" + outside + "/secret",
	} {
		if b, err := h.Read(n); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %q, %v", n, b, err)
		}
		if s, err := h.Link(n + "/x"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("link %s/x: %q, %v", n, s, err)
		}
	}

	for _, n := range []string{"sys/absdir", "sys/climbdir", outside, up + outside[1:]} {
		if names, err := h.Names(n); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %q, %v", n, names, err)
		}
		if d, err := h.Open(n); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, %v", n, d, err)
		}
	}

	// What is in the tree itself is found, from its root.
	d, err := h.Open("sys/bus")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	deep, err := d.Open("deep")
	if err != nil {
		t.Fatal(err)
	}
	defer deep.Close()
	for _, ask := range []func() (string, error){
		func() (string, error) { return h.String("sys/hostname") },
		func() (string, error) { return h.String("sys/root/etc/hostname") },
		func() (string, error) { return h.String("/etc/hostname") },
		func() (string, error) { return d.String("own") },
		func() (string, error) { return d.String("deep/climb") },
		func() (string, error) { return deep.String("climb") },
		func() (string, error) { return h.String(up + "etc/hostname") },
	} {
		if s, err := ask(); s != "captured" || err != nil {
			t.Errorf("%q, %v", s, err)
		}
	}
}

func TestSpecialFilesDoNotHang(t *testing.T) {
	dir := t.TempDir()
	files := map[string]uint32{"pipe": unix.S_IFIFO, "socket": unix.S_IFSOCK}
	for name, mode := range files {
		if err := unix.Mknod(filepath.Join(dir, name), mode|0o644, 0); err != nil {
			t.Fatal(err)
		}
	}

	zero := unix.Mkdev(1, 5)
	if err := unix.Mknod(filepath.Join(dir, "zero"), unix.S_IFCHR|0o644, int(zero)); err == nil {
		files["zero"] = unix.S_IFCHR
	} else {
		t.Logf("without a device node, which only root can make: %v", err)
	}

	h, err := host.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	done := make(chan bool)
	go func() {
		defer close(done)
		for name := range files {
			if b, err := h.Read(name); err == nil {
				t.Errorf("%s gave %d bytes", name, len(b))
			}
			if s, err := h.String(name); err == nil {
				t.Errorf("%s gave %q", name, s)
			}
			if n, err := h.Names(name); !errors.Is(err, unix.ENOTDIR) {
				t.Errorf("%s: %v, %v", name, n, err)
			}
		}
	}()

	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("hangs")
	}
}

func TestLive(t *testing.T) {
	for _, name := range []string{"", "/"} {
		h, err := host.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		if !h.Live() || h.Path("sys") != "/sys" {
			t.Errorf("%q: live %v, path %s", name, h.Live(), h.Path("sys"))
		}
		names, err := h.Names("proc/self")
		if err != nil || !slices.Contains(names, "stat") || !slices.IsSorted(names) || slices.Contains(names, ".") {
			t.Errorf("names %v, %v", names, err)
		}
		if s, err := h.String("proc/sys/kernel/ostype"); s != "Linux" || err != nil {
			t.Errorf("%q, %v", s, err)
		}
	}
}

// A test's host is live, and asks before each operation whether it may be.
func TestFake(t *testing.T) {
	k := hosttest.NewKernel(t, sample)
	h := k.Host()
	d, err := h.Open("sys/bus")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if !h.Live() || h.Real() {
		t.Errorf("live %v, real %v", h.Live(), h.Real())
	}

	ignore := func(_ any, err error) error { return err }
	for want, do := range map[string]func() error{
		"write sys/x":             func() error { return h.Write("sys/x", "1") },
		"write sys/bus/dev/id":    func() error { return d.Write("dev/id", "2") },
		"read sys/bus/dev/id":     func() error { return ignore(d.String("dev/id")) },
		"read sys/devices":        func() error { return ignore(h.Read("sys/devices")) },
		"readlink sys/bus/dev":    func() error { return ignore(d.Link("dev")) },
		"readdir sys":             func() error { return ignore(h.Names("sys")) },
		"open sys/devices":        func() error { return ignore(h.Open("sys/devices")) },
		"open sys/bus/dev/number": func() error { return ignore(d.File("dev/number")) },
		"open dev/null":           func() error { return ignore(h.OpenNode("dev/null", 0)) },
		"replace run/a":           func() error { return h.Replace("run/a", nil) },
		"remove run/a":            func() error { return h.Remove("run/a") },
		"own dev/a":               func() error { return h.Own("dev/a", 0, 0, 0) },
		"modprobe igb":            func() error { return h.Modprobe(context.Background(), "igb") },
		"exclusive dev/sda":       func() error { return ignore(h.InUse("dev/sda")) },
		"socket run/netns/a":      func() error { return ignore(h.SocketIn("run/netns/a", 0, 0)) },
		"ioctl eth0":              func() error { return ignore(h.Ioctl(-1, "eth0", 0, nil)) },
		"stat proc/1/fd/0":        func() error { _, _, err := h.DeviceNumber("proc/1/fd/0"); return err },
	} {
		asked := ""
		k.SetFault(func(op, name string) error {
			asked = op + " " + name
			return unix.EIO
		})
		if err := do(); !errors.Is(err, unix.EIO) || asked != want {
			t.Errorf("%s: %v, asked %q", want, err, asked)
		}
	}
}

// Nothing of a captured host can be changed, and nobody be asked.
func TestCapturedSystem(t *testing.T) {
	for kind, h := range sample.Hosts(t) {
		errs := map[string]error{
			"replace": h.Replace("run/a", nil), "remove": h.Remove("run/a"), "own": h.Own("dev/a", 0, 0, 0),
			"modprobe": h.Modprobe(context.Background(), "igb"),
		}
		_, errs["socket"] = h.Socket(unix.NETLINK_ROUTE, 0)
		_, errs["open"] = h.OpenNode("dev/null", 0)
		_, errs["ioctl"] = h.Ioctl(-1, "eth0", 0, nil)
		_, _, errs["stat"] = h.DeviceNumber("dev/null")
		for op, err := range errs {
			if !errors.Is(err, host.ErrReadOnly) {
				t.Errorf("%s: %s: %v", kind, op, err)
			}
		}
	}
}

func TestReplace(t *testing.T) {
	h := hosttest.NewKernel(t, sample).Host()
	for _, content := range []string{"one", "two"} {
		if err := h.Replace("run/not/there/yet", []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got, err := h.Read("run/not/there/yet"); string(got) != content || err != nil {
			t.Errorf("%q, %v, want %q", got, err, content)
		}
	}
	if st, err := os.Stat(h.Path("run/not/there/yet")); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("it is not for all to read: %v, %v", st, err)
	}
	if names, err := h.Names("run/not/there"); len(names) != 1 || err != nil {
		t.Errorf("left beside it: %q, %v", names, err)
	}
	for range 2 {
		if err := h.Remove("run/not/there/yet"); err != nil {
			t.Error(err)
		}
	}
	if h.Exists("run/not/there/yet") {
		t.Error("it is still there")
	}
}

func TestModprobeArgs(t *testing.T) {
	for module, want := range map[string][]string{
		"vfio_pci": {"--", "vfio_pci"}, "pci:v00008086d000010C9": {"-b", "--", "pci:v00008086d000010C9"},
	} {
		if got := host.ModprobeArgs(module); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", module, got, want)
		}
	}
}
