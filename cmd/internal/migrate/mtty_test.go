//go:build lab

package migrate

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// A mediated device of the kernel's sample driver, whose state moves, between two lab hosts: leases are of PCI functions,
// so the test has them for it. The other host is reached by the command of VIADUCT_PEER, whose last words are those of a
// viaduct's; by default that is this host, which stands for both.

const (
	mttyHere  = "8ce5d3a6-3e0c-4b0c-9d2e-5f1a7c1b2d50"
	mttyThere = "8ce5d3a6-3e0c-4b0c-9d2e-5f1a7c1b2d51"
	mttyDir   = "/run/mtty"
	mdevs     = "/sys/bus/mdev/devices"
)

// makeMtty makes a device of a type, in place of one that is there.
func makeMtty(kind, uuid string) error {
	if out, err := exec.Command("modprobe", "mtty").CombinedOutput(); err != nil {
		return fmt.Errorf("modprobe mtty: %w: %s", err, out)
	}
	if err := endMtty(uuid); err != nil {
		return err
	}
	return os.WriteFile("/sys/class/mdev_bus/mtty/mdev_supported_types/"+kind+"/create", []byte(uuid), 0)
}

func endMtty(uuid string) error {
	err := os.WriteFile(filepath.Join(mdevs, uuid, "remove"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// mttyKind is the type of a device that is there.
func mttyKind(uuid string) (string, error) {
	kind, err := os.Readlink(filepath.Join(mdevs, uuid, "mdev_type"))
	return filepath.Base(kind), err
}

// mttyWords start a QEMU with a device.
func mttyWords(uuid, socket string) []string {
	return []string{
		"-nodefaults", "-display", "none", "-machine", "q35,accel=tcg,sata=off", "-m", "64M",
		"-device", "vfio-pci,sysfsdev=" + filepath.Join(mdevs, uuid) + ",enable-migration=on",
		"-qmp", "unix:" + socket + ",server=on,wait=off", "-qtest", "unix:" + socket + ".qtest,server=on,wait=off",
		"-qtest-log", "none",
	}
}

// mttyLease is what one host has for the guest, in files that each process of the test reads.
type mttyLease struct {
	h    *iommu.Host
	name string // here or there
	uuid string
}

func (l *mttyLease) file() string { return filepath.Join(mttyDir, l.name+".json") }

func (l *mttyLease) Save(_ context.Context, r *Record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return os.WriteFile(l.file(), b, 0o600)
}

func (l *mttyLease) Drop(context.Context, *Record, bool) error { return os.Remove(l.file()) }

func (l *mttyLease) Record(string) (*Record, error) {
	b, err := os.ReadFile(l.file())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var r Record
	return &r, errors.Join(err, json.Unmarshal(b, &r))
}

func (*mttyLease) Address(string) (string, error)                   { return "", nil }
func (*mttyLease) SetAddress(context.Context, string, string) error { return nil }
func (*mttyLease) Device(*Record) (map[string]any, error) {
	return nil, errors.New("it is not plugged")
}
func (l *mttyLease) Release(context.Context, string) error { return endMtty(l.uuid) }
func (l *mttyLease) Alive(r *Record) bool                  { return r.Started.Alive(l.h) }

// mttyHouse is the destination.
type mttyHouse struct{ *mttyLease }

func (m mttyHouse) Facts(context.Context, *FactsWish) (*FactsAnswer, error) {
	return nil, errors.New("nobody asks")
}
func (m mttyHouse) Save(r *Record) error { return m.mttyLease.Save(context.Background(), r) }
func (m mttyHouse) Drop(string) error    { return m.mttyLease.Drop(context.Background(), nil, false) }
func (m mttyHouse) Reserve(_ context.Context, r *Record) error {
	return makeMtty(r.Order.From, m.uuid)
}
func (m mttyHouse) Leased(string) (bool, error) {
	_, err := mttyKind(m.uuid)
	return err == nil, nil
}
func (m mttyHouse) Socket(*Record) string                    { return filepath.Join(mttyDir, "there") }
func (m mttyHouse) End(ctx context.Context, r *Record) error { return endProcess(ctx, m.h, r.Started) }
func (m mttyHouse) Stay(context.Context, *Record) error      { return nil }
func (m mttyHouse) Start(ctx context.Context, r *Record) error {
	_ = os.Remove(r.Socket)
	words := append(mttyWords(m.uuid, r.Socket), "-S", "-incoming", "defer")
	pid, err := startQEMU(ctx, &Side{Host: m.h}, r, "/usr/bin/qemu-system-x86_64", words)
	r.Started = holder.NameProcess(m.h, pid)
	return err
}

func mttyHost(t *testing.T, name, uuid string) *mttyLease {
	t.Helper()
	h, err := iommu.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	if err := os.MkdirAll("/run/viaduct", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(mttyDir, 0o700); err != nil {
		t.Fatal(err)
	}
	return &mttyLease{h: h, name: name, uuid: uuid}
}

// TestMttyPeer is the other host's side, for TestMtty: the conversation, the memory of the move that MTTY_DATA names, or,
// with MTTY_READ, what the registers of the guest's device have.
func TestMttyPeer(t *testing.T) {
	house := mttyHouse{mttyHost(t, "there", mttyThere)}
	switch data := os.Getenv("MTTY_DATA"); {
	case os.Getenv("MTTY_PEER") == "":
		t.Skip("it is run by TestMtty")
	case os.Getenv("MTTY_READ") != "":
		fmt.Println(openUART(t, house.Socket(nil)).registers())
	case data != "":
		r, err := house.Record("")
		if err != nil {
			t.Fatal(err)
		}
		socket, err := DataSocket(r, data)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		Carry(conn, standardStreams{})
	default:
		if err := (&Server{House: house, Version: "test"}).Serve(t.Context(), os.Stdin, os.Stdout); err != nil {
			t.Fatal(err)
		}
	}
}

type standardStreams struct{}

func (standardStreams) Read(b []byte) (int, error)  { return os.Stdin.Read(b) }
func (standardStreams) Write(b []byte) (int, error) { return os.Stdout.Write(b) }
func (standardStreams) Close() error                { return errors.Join(os.Stdin.Close(), os.Stdout.Close()) }

// uart is the guest's serial port, as its CPU reaches it.
type uart struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
	base int // of its registers
}

// openUART connects to the CPU of a guest, and waits until its firmware has given the device its place.
func openUART(t *testing.T, socket string) *uart {
	t.Helper()
	conn, err := net.Dial("unix", socket+".qtest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	u := &uart{t: t, conn: conn, in: bufio.NewReader(conn)}
	const ids, bar = 0, 0x10
	last := 0
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Second) {
		for slot := range 32 {
			if u.config(slot, ids) != 0x32534348 {
				continue
			}
			// While the firmware measures it, it has other addresses.
			base := u.config(slot, bar) &^ 3
			if base != 0 && base == last {
				u.base = base
				return u
			}
			last = base
		}
	}
	t.Fatal("the guest's firmware does not find the device")
	return nil
}

// ask says a line of QEMU's protocol for tests (docs/devel/testing/qtest.rst).
func (u *uart) ask(format string, a ...any) int {
	u.t.Helper()
	if _, err := fmt.Fprintf(u.conn, format+"\n", a...); err != nil {
		u.t.Fatal(err)
	}
	for {
		line, err := u.in.ReadString('\n')
		if err != nil {
			u.t.Fatal(err)
		}
		if !strings.HasPrefix(line, "OK") {
			continue
		}
		n := 0
		if _, err := fmt.Sscanf(line, "OK 0x%x", &n); err != nil && strings.TrimSpace(line) != "OK" {
			u.t.Fatalf("%s: %v", line, err)
		}
		return n
	}
}

// config reads configuration space where the firmware has put it in memory, for the ports that lead there are its own.
func (u *uart) config(slot, at int) int {
	const space = 0xb0000000
	return u.ask("readl %#x", space|slot<<15|at)
}

// The registers that are written: the scratch register, and the divisor, which is there while the line's control register
// has this bit.
const (
	lineControl, scratch = 3, 7
	divisorShown         = 0x80
)

func (u *uart) write(value, divisor int) {
	u.ask("outb %#x %#x", u.base+scratch, value)
	u.ask("outb %#x %#x", u.base+lineControl, divisorShown)
	u.ask("outb %#x %#x", u.base, divisor&0xff)
	u.ask("outb %#x %#x", u.base+1, divisor>>8)
}

func (u *uart) registers() string {
	return fmt.Sprintf("scratch %#x divisor %#x control %#x", u.ask("inb %#x", u.base+scratch),
		u.ask("inb %#x", u.base)|u.ask("inb %#x", u.base+1)<<8, u.ask("inb %#x", u.base+lineControl))
}

// TestMtty: a device's state moves with its guest: what the guest has written into its registers they have there. One of
// another type is refused by the check and, where nobody asks that, by the driver, and the guest goes on here.
func TestMtty(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("it is for a lab host")
	}
	here := mttyHost(t, "here", mttyHere)
	peer := os.Getenv("VIADUCT_PEER")
	if peer == "" {
		peer = "/job/mtty-peer"
	}
	way, err := ParseTransport("exec:"+peer, "test", os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	if err := makeMtty("mtty-1", mttyHere); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(mttyDir, "here")
	_ = os.Remove(socket)
	pid, err := startQEMU(t.Context(), &Side{Host: here.h}, &Record{ID: NewID(), Socket: socket},
		"/usr/bin/qemu-system-x86_64",
		mttyWords(mttyHere, socket))
	if err != nil {
		t.Fatal(err)
	}
	started := holder.NameProcess(here.h, pid)
	t.Cleanup(func() { _ = endProcess(context.Background(), here.h, started) })
	u := openUART(t, socket)
	u.write(0x5a, 0x0c35)
	want := u.registers()
	t.Logf("here: %s", want)
	if !strings.Contains(want, "scratch 0x5a divisor 0xc35") {
		t.Fatalf("the device has %s", want)
	}

	move := func(kind string) (*Driver, error) {
		d := &Driver{Home: here, Remote: way, Limits: Limits{Whole: 5 * time.Minute}, Record: &Record{
			ID: NewID(), Guest: "web", Phase: Checked, Source: true, Peer: peer, Socket: socket, Started: started,
			Order: Order{Way: ByVFIO, From: kind, Count: 1},
		}}
		return d, errors.Join(here.Save(t.Context(), d.Record), d.Run(t.Context(), Forward))
	}
	refusedByCheck(t, socket)
	_, err = move("mtty-2")
	if err == nil || !strings.Contains(err.Error(), "could not load the guest") {
		t.Errorf("the driver takes the state of another type: %v", err)
	}
	t.Logf("to a device of another type: %v", err)
	if left, _ := here.Record(""); left != nil {
		t.Errorf("the move is not over: %+v", left)
	}
	if got := u.registers(); got != want {
		t.Errorf("afterwards the device has %s", got)
	}
	checkRuns(t, socket)

	d, err := move("mtty-1")
	if err != nil || !d.Outcome.Moved || d.Outcome.Device == 0 {
		t.Fatalf("%+v: %v", d.Outcome, err)
	}
	t.Logf("moved: %d bytes of the device's state, QEMU's downtime %d ms", d.Outcome.Device, *d.Outcome.Downtime)
	out, err := exec.Command("/bin/sh", "-c", peer+" read").CombinedOutput()
	if err != nil || !strings.Contains(string(out), want) {
		t.Errorf("there: %s, %v; want %s", out, err, want)
	}
	t.Logf("there: %s", out)
	if started.Alive(here.h) {
		t.Error("the QEMU here has not ended")
	}
	if _, err := mttyKind(mttyHere); err == nil {
		t.Error("the device here was not released")
	}
}

// refusedByCheck: the check refuses a device of another type, and not one of the same.
func refusedByCheck(t *testing.T, socket string) {
	t.Helper()
	m, err := dial(t.Context(), socket)
	if err != nil || m == nil {
		t.Fatalf("%v", err)
	}
	defer m.Close()
	g, f := example()
	g.VM.Standby = ""
	if g.State, err = m.asked(g.VM); err != nil {
		t.Fatal(err)
	}
	kind, err := mttyKind(mttyHere)
	if err != nil {
		t.Fatal(err)
	}
	g.Devices[0].Address, g.Devices[0].Kind = mttyHere, kind
	for there, want := range map[string]Result{"mtty-1": OK, "mtty-2": Refuse} {
		f.Ports[0].VFs[0].Kind = there
		for _, l := range Check(g, f, f, Wish{By: ByVFIO}).Lines {
			if l.Check == "device-state" && l.Result != OK || l.Check == "device-ids" && l.Result != want {
				t.Errorf("%s to %s: %+v", kind, there, l)
			}
			if l.Check == "device-ids" || l.Check == "device-state" {
				t.Logf("check, to %s: %s %s: %s", there, l.Result, l.Check, l.What)
			}
		}
	}
}

func checkRuns(t *testing.T, socket string) {
	t.Helper()
	m, err := dial(t.Context(), socket)
	if err != nil || m == nil {
		t.Fatalf("%v", err)
	}
	defer m.Close()
	if status, _, err := m.look(); err != nil || status != "running" {
		t.Errorf("the guest is %s: %v", status, err)
	}
}
