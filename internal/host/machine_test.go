package host_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
)

// The machine that this test runs on, as far as it may be touched.
func TestMachine(t *testing.T) {
	h, err := host.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if !h.Live() || !h.Real() {
		t.Error("it does not live")
	}
	file := filepath.Join(t.TempDir(), "sub", "file")
	name := strings.TrimPrefix(file, "/")
	if err := h.Replace(name, []byte("one\n")); err != nil {
		t.Fatal(err)
	}
	if err := h.Write(name, "two\n"); err != nil {
		t.Error(err)
	}
	if s, err := h.String(name); err != nil || s != "two" {
		t.Errorf("%q, %v", s, err)
	}
	if err := h.Write(name+".not", "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := h.Own(name, os.Getuid(), os.Getgid(), 0o640); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if used, err := h.InUse(name); used || err != nil {
		t.Errorf("a file is in exclusive use: %v, %v", used, err)
	}
	if used, err := h.InUse(name + ".not"); used || err != nil {
		t.Errorf("what is not there is in exclusive use: %v, %v", used, err)
	}
	if err := errors.Join(h.Remove(name), h.Remove(name)); err != nil || h.Exists(name) {
		t.Errorf("removed twice: %v", err)
	}

	if block, number, err := h.DeviceNumber("dev/null"); err != nil || block || number != 1<<32|3 {
		t.Errorf("/dev/null: %v, %#x, %v", block, number, err)
	}
	if _, _, err := h.DeviceNumber("proc"); !errors.Is(err, host.ErrNoDevice) {
		t.Errorf("/proc: %v", err)
	}
	fd, err := h.OpenNode("dev/zero", unix.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if b := []byte{1, 1}; true {
		if n, err := unix.Read(fd, b); n != 2 || err != nil || !bytes.Equal(b, []byte{0, 0}) {
			t.Errorf("%d, %v, %v", n, err, b)
		}
	}
	if _, err := h.Ioctl(fd, "dev/zero", unix.TCGETS, unsafe.Pointer(&unix.Termios{})); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("/dev/zero as a terminal: %v", err)
	}
	var request struct {
		name [unix.IFNAMSIZ]byte
		mtu  int32
		_    [20]byte
	}
	copy(request.name[:], "lo")
	if _, err := h.Ioctl(-1, "lo", unix.SIOCGIFMTU, unsafe.Pointer(&request)); err != nil || request.mtu == 0 {
		t.Errorf("lo has MTU %d, %v", request.mtu, err)
	}
	socket, err := h.SocketIn("proc/self/ns/net", unix.NETLINK_ROUTE, 0)
	if err == nil {
		unix.Close(socket)
	} else if !errors.Is(err, unix.EPERM) {
		t.Errorf("a socket in this namespace: %v", err)
	}
	if socket, err = h.Socket(unix.NETLINK_KOBJECT_UEVENT, 1); err != nil {
		t.Errorf("a socket that hears of devices: %v", err)
	}
	unix.Close(socket)
	if _, err := h.SocketIn("proc/not/there", unix.NETLINK_ROUTE, 0); err == nil {
		t.Error("a socket in no namespace")
	}

	names, err := h.Names("proc/self/fdinfo")
	if err != nil || len(names) < 3 {
		t.Errorf("%v, %v", names, err)
	}
	if has, err := h.Has("proc/self/exe"); !has || err != nil {
		t.Errorf("%v, %v", has, err)
	}
	if has, err := h.Has("proc/self/no"); has || err != nil {
		t.Errorf("%v, %v", has, err)
	}
}

// modprobe is the program that the kernel names, its words are told, and one that does not end is not waited for.
func TestModprobe(t *testing.T) {
	program := filepath.Join(t.TempDir(), "modprobe")
	script := func(text string) {
		t.Helper()
		if err := os.WriteFile(program, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}

	t.Setenv("MODPROBE_OPTIONS", "--config /somewhere")
	script(`[ "$*$MODPROBE_OPTIONS" = "-b -- pci:v1" ] || { echo "bad words $*" >&2; exit 3; }`)
	run := func(ctx context.Context, module string) error {
		return host.RunModprobe(ctx, hosttest.Tree{"proc/sys/kernel/modprobe": program + "\n"}.Host(t), module)
	}

	if err := run(context.Background(), "pci:v1"); err != nil {
		t.Error(err)
	}
	if err := run(context.Background(), "igb"); err == nil || !strings.Contains(err.Error(), "bad words -- igb") {
		t.Error(err)
	}

	script("exec sleep 1000")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := run(ctx, "igb"); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 10*time.Second {
		t.Errorf("after %s: %v", time.Since(began), err)
	}

	program += ".not"
	if err := run(context.Background(), "igb"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// A modprobe that does not end when it is killed, as one that hangs in the kernel, is not waited for. One that another
// process traces is such a one: it is not over before its tracer, another run of this test, has ended.
func TestModprobeThatStays(t *testing.T) {
	const traced = "VIADUCT_TEST_TRACED"
	if pid, err := strconv.Atoi(os.Getenv(traced)); err == nil {
		runtime.LockOSThread()
		fmt.Println("traced:", unix.PtraceSeize(pid))
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}

	dir := t.TempDir()
	program, pid := filepath.Join(dir, "modprobe"), filepath.Join(dir, "pid")
	text := fmt.Sprintf("#!/bin/sh\necho $$ > %s.new; mv %s.new %s; exec sleep 1000\n", pid, pid, pid)
	if err := os.WriteFile(program, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- host.RunModprobe(ctx, hosttest.Tree{"proc/sys/kernel/modprobe": program + "\n"}.Host(t), "igb")
	}()
	number, err := os.ReadFile(pid)
	for try := 0; err != nil && try < 1000; try++ {
		time.Sleep(10 * time.Millisecond)
		number, err = os.ReadFile(pid)
	}
	if err != nil {
		t.Fatal(err)
	}

	tracer := exec.Command(os.Args[0], "-test.run=^TestModprobeThatStays$")
	tracer.Env = append(os.Environ(), traced+"="+strings.TrimSpace(string(number)))
	hold, err1 := tracer.StdinPipe()
	out, err2 := tracer.StdoutPipe()
	if err := errors.Join(err1, err2, tracer.Start()); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(hold.Close(), tracer.Wait()) }()
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "traced: <nil>\n" {
		cancel()
		<-done
		t.Skip("who may not trace cannot have it stay:", said, err)
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "it hangs in the kernel") {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it is waited for")
	}
}

// TestOwn: a file that is given to somebody else is his alone, whomever an access control list let in before.
func TestOwn(t *testing.T) {
	h, err := host.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	file := filepath.Join(t.TempDir(), "node")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Chmod(file, 0o660)); err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(file, "/")
	if o, err := h.Owner(name); err != nil || o.ACL || o.Private() || o.Mode != 0o660 || o.UID != os.Getuid() {
		t.Errorf("%+v, %v", o, err)
	}

	// Of user 1000, who may read and write (acl(5): version 2, then tag, permissions and id of each entry).
	list := []byte{2, 0, 0, 0}
	for _, e := range [][3]byte{{1, 6, 0xff}, {2, 6, 0}, {4, 0, 0xff}, {16, 6, 0xff}, {32, 0, 0xff}} {
		id := []byte{e[2], e[2], e[2], e[2]}
		if e[0] == 2 {
			id = []byte{0xe8, 3, 0, 0}
		}
		list = append(append(list, e[0], 0, e[1], 0), id...)
	}
	if err := unix.Setxattr(file, "system.posix_acl_access", list, 0); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("the file system of the folder for temporary files has no access control lists")
	} else if err != nil {
		t.Fatal(err)
	}
	if o, err := h.Owner(name); err != nil || !o.ACL || o.Private() {
		t.Errorf("with a list: %+v, %v", o, err)
	}
	if err := h.Own(name, -1, -1, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Getxattr(file, "system.posix_acl_access", nil); !errors.Is(err, unix.ENODATA) {
		t.Errorf("the list is left: %v", err)
	}
	if _, err := h.Owner(name + ".not"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of what is not there: %v", err)
	}
}
