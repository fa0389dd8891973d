//go:build lab

package labtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"viaduct/iommu"
	"viaduct/vfio"
)

// of are the functions on this host of a vendor and device id.
func of(vendor, device string) []string {
	var out []string
	for _, n := range names(devicesDir) {
		if attr(devicesDir, n, "vendor") == "0x"+vendor && attr(devicesDir, n, "device") == "0x"+device {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

// behindPort is one of those functions that has a root port for itself: so it is in a group of its own, and the port can
// reset it.
func behindPort(t *testing.T, functions []string) string {
	t.Helper()
	for _, n := range functions {
		real, err := filepath.EvalSymlinks(filepath.Join(devicesDir, n))
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(names(devicesDir), filepath.Base(filepath.Dir(real))) {
			return n
		}
	}
	t.Fatalf("none of %v is behind a root port", functions)
	return ""
}

// take gives a function to vfio-pci by the kernel's files alone, until the test ends.
func take(t *testing.T, function string) {
	t.Helper()
	home := link(devicesDir, function, "driver")
	shell(t, fmt.Sprintf(`modprobe vfio-pci; cd %s/%s; echo vfio-pci >driver_override; [ ! -e driver ] || echo %s >driver/unbind
		echo %s >/sys/bus/pci/drivers_probe`, devicesDir, function, function, function))
	if got := link(devicesDir, function, "driver"); got != "vfio-pci" {
		t.Fatalf("%s is on %q", function, got)
	}
	t.Cleanup(func() {
		shell(t, fmt.Sprintf(`cd %s/%s; echo >driver_override; echo %s >driver/unbind`, devicesDir, function, function))
		if home != "" {
			shell(t, fmt.Sprintf(`echo %s >/sys/bus/pci/drivers_probe`, function))
		}
	})
}

func openHost(t *testing.T) *iommu.Host {
	t.Helper()
	h, err := iommu.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

// must is a value without an error.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// eachWay runs a test by each way that the host has, and says which ones it has not.
func eachWay(t *testing.T, test func(t *testing.T, way vfio.Way)) {
	for _, way := range []vfio.Way{vfio.IOMMUFD, vfio.Container} {
		t.Run(string(way), func(t *testing.T) {
			node := map[vfio.Way]string{vfio.IOMMUFD: "/dev/iommu", vfio.Container: "/dev/vfio/vfio"}[way]
			if _, err := os.Stat(node); err != nil {
				t.Skipf("this kernel has no %s", node)
			}
			test(t, way)
		})
	}
}

// edu is QEMU's device for teaching (its docs/specs/edu.rst), with what is needed to drive it.
type edu struct {
	t       *testing.T
	context *vfio.Context
	*vfio.Device
	regs       *vfio.Mapped
	interrupts *vfio.Interrupts
}

const (
	eduAlive, eduRaise, eduAck                  = 0x04, 0x60, 0x64
	eduSource, eduTarget, eduCount, eduCommand  = 0x80, 0x88, 0x90, 0x98
	eduStart, eduToMemory, eduInterrupt, eduRAM = 1, 2, 4, 0x40000
)

func openEdu(t *testing.T, h *iommu.Host, way vfio.Way, function string) *edu {
	t.Helper()
	c := must(vfio.NewContext(h, vfio.Options{Way: way}))
	t.Cleanup(func() { check(t, c.Close()) })
	d, err := c.Open(function)
	if err != nil {
		t.Fatal(err)
	}
	e := &edu{t: t, context: c, Device: d}
	config := must(d.Region(vfio.Config))
	command := make([]byte, 2)
	must(config.ReadAt(command, 4))
	must(config.WriteAt([]byte{command[0] | 6, command[1]}, 4)) // memory and bus mastering
	e.regs = must(must(d.Region(vfio.BAR0)).Map())
	e.interrupts = must(d.Interrupts(vfio.MSI, 1))
	return e
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

// wait waits for the device's interrupt, and acknowledges it.
func (e *edu) wait() {
	e.t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), 30*time.Second)
	defer stop()
	if _, err := e.interrupts.Wait(ctx, 0); err != nil {
		e.t.Fatal(err)
	}
	check(e.t, e.regs.Store32(eduAck, must(e.regs.Load32(0x24))))
}

// dma has the device copy: to memory, or from it.
func (e *edu) dma(source, target uint64, size int, how uint32) {
	e.t.Helper()
	check(e.t, e.regs.Store64(eduSource, source))
	check(e.t, e.regs.Store64(eduTarget, target))
	check(e.t, e.regs.Store64(eduCount, uint64(size)))
	check(e.t, e.regs.Store32(eduCommand, eduStart|eduInterrupt|how))
	e.wait()
}

// faults counts what the IOMMU's driver has reported of a device.
func faults(t *testing.T) int {
	n := 0
	for line := range strings.Lines(run(t, "dmesg").stdout) {
		for _, sign := range []string{"IO_PAGE_FAULT", "DMAR: [DMA", "event: F_TRANSLATION", "event 0x10 received"} {
			if strings.Contains(line, sign) {
				n++
			}
		}
	}
	return n
}

// TestVFIODMA drives a device from here: its DMA by IOVA, a DMA that faults, and its interrupt.
func TestVFIODMA(t *testing.T) {
	h := openHost(t)
	function := behindPort(t, of("1234", "11e8"))
	take(t, function)
	eachWay(t, func(t *testing.T, way vfio.Way) {
		const size, here, away = 4096, 0x100000, 0x300000
		e := openEdu(t, h, way, function)
		check(t, e.regs.Store32(eduAlive, 0x12345678))
		if got := must(e.regs.Load32(eduAlive)); got != ^uint32(0x12345678) {
			t.Errorf("the device says %#x", got)
		}

		memory := must(vfio.NewMemory(2*size, 0))
		t.Cleanup(func() { check(t, memory.Close()) })
		check(t, e.context.Map(vfio.Mapping{IOVA: here, Memory: memory, Access: vfio.ReadWrite}))
		from, to := memory.Bytes()[:size], memory.Bytes()[size:]
		for i := range from {
			from[i] = byte(rand.N(256))
		}
		e.dma(here, eduRAM, size, 0)
		e.dma(eduRAM, here+size, size, eduToMemory)
		if !bytes.Equal(from, to) {
			t.Error("what came back is not what was sent")
		}

		clear(to)
		before := faults(t)
		// The kernel reports but some of many.
		await(t, "a fault in the kernel's log", func() bool {
			e.dma(eduRAM, away, size, eduToMemory)
			return faults(t) > before
		})
		check(t, e.context.Unmap(here, 2*size))
		e.dma(eduRAM, here+size, size, eduToMemory)
		if !bytes.Equal(to, make([]byte, size)) {
			t.Error("a DMA that is not mapped has changed memory")
		}

		check(t, e.regs.Store32(eduRaise, 1))
		e.wait()
	})
}

// await waits until something is so.
func await(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !so(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// TestVFIOFault accesses a device that does not answer: that is an error, and the process lives.
func TestVFIOFault(t *testing.T) {
	h := openHost(t)
	function := behindPort(t, of("1234", "11e8"))
	take(t, function)
	eachWay(t, func(t *testing.T, way vfio.Way) {
		e := openEdu(t, h, way, function)
		config := must(e.Region(vfio.Config))
		must(config.WriteAt([]byte{0, 0}, 4)) // memory off
		if _, err := e.regs.Load32(0); !errors.Is(err, vfio.ErrFault) {
			t.Errorf("load: %v", err)
		}
		err := e.regs.Batch(func(r vfio.Registers) error {
			r.Load32(eduAlive)
			t.Error("a batch goes on after a fault")
			return nil
		})
		if !errors.Is(err, vfio.ErrFault) {
			t.Errorf("batch: %v", err)
		}
		if err := e.regs.Store32(eduAlive, 1); !errors.Is(err, vfio.ErrFault) {
			t.Errorf("store: %v", err)
		}
		if _, err := must(e.Region(vfio.BAR0)).ReadAt(make([]byte, 4), 0); !errors.Is(err, vfio.ErrFault) {
			t.Errorf("read: %v", err)
		}
		must(config.WriteAt([]byte{2, 0}, 4))
		if got := must(e.regs.Load32(0)); got != 0x010000ed {
			t.Errorf("the device says it is %#x", got)
		}

		if can := must(e.CanSleep()); can {
			check(t, e.Sleep())
			if _, err := e.regs.Load32(0); !errors.Is(err, vfio.ErrFault) {
				t.Errorf("load of a device that sleeps: %v", err)
			}
			check(t, e.Wake())
			if got := must(e.regs.Load32(0)); got != 0x010000ed {
				t.Errorf("the device says it is %#x", got)
			}
		}
		for _, at := range []int64{1, 2} {
			if _, err := e.regs.Load32(at); !errors.Is(err, vfio.ErrAlignment) {
				t.Errorf("load at %d: %v", at, err)
			}
		}
		if _, err := e.regs.Load64(1 << 20); !errors.Is(err, vfio.ErrRange) {
			t.Errorf("load beyond the end: %v", err)
		}
	})
}

// TestVFIOInterrupts masks and unmasks a line, and lets go of a device when the host asks for it.
func TestVFIOInterrupts(t *testing.T) {
	h := openHost(t)
	function := behindPort(t, of("1234", "11e8"))
	take(t, function)
	eachWay(t, func(t *testing.T, way vfio.Way) {
		e := openEdu(t, h, way, function)
		check(t, e.interrupts.Close())
		e.interrupts = must(e.Interrupts(vfio.INTx, 1))
		raise := func() { check(t, e.regs.Store32(eduRaise, 1)) }
		silent := func(why string) {
			t.Helper()
			ctx, stop := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer stop()
			if n, err := e.interrupts.Wait(ctx, 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s, and it came %d times: %v", why, n, err)
			}
		}

		raise()
		e.wait() // which masks the line
		raise()
		silent("the line is masked since it came")
		check(t, e.interrupts.Unmask(0))
		e.wait()
		check(t, e.interrupts.Unmask(0))
		check(t, e.interrupts.Mask(0))
		raise()
		silent("the line was masked")
		check(t, e.interrupts.Unmask(0))
		e.wait()

		for _, kind := range []vfio.Kind{vfio.ErrorReport, vfio.Request} {
			if must(e.InterruptInfo(kind)).Count == 0 {
				t.Logf("%s has no %s", function, kind)
				continue
			}
			i := must(e.Interrupts(kind, 1))
			check(t, i.Trigger(0))
			must(i.Wait(t.Context(), 0))
			check(t, i.Close())
		}
	})

	eachWay(t, func(t *testing.T, way vfio.Way) {
		e := openEdu(t, h, way, function)
		request := must(e.Interrupts(vfio.Request, 1))
		done := make(chan result, 1)
		go func() { done <- run(t, "sh", "-c", "echo "+function+" >/sys/bus/pci/drivers/vfio-pci/unbind") }()
		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		defer stop()
		must(request.Wait(ctx, 0))
		check(t, e.context.Close())
		if r := <-done; r.status != 0 || link(devicesDir, function, "driver") != "" {
			t.Errorf("unbind: exit status %d, %s", r.status, r.stderr)
		}
		shell(t, "echo "+function+" >/sys/bus/pci/drivers_probe")
	})
}

// TestVFIOToken shares a token between a PF on vfio-pci and its VF.
func TestVFIOToken(t *testing.T) {
	h := openHost(t)
	pf := of("8086", "10c9")[0]
	shell(t, "modprobe vfio-pci && echo Y >/sys/module/vfio_pci/parameters/enable_sriov")
	t.Cleanup(func() { shell(t, "echo N >/sys/module/vfio_pci/parameters/enable_sriov") })
	take(t, pf)
	token := vfio.NewToken()
	open := func(function string, token *vfio.Token) (*vfio.Device, error) {
		c := must(vfio.NewContext(h, vfio.Options{Way: vfio.Container}))
		t.Cleanup(func() { check(t, c.Close()) })
		if token == nil {
			return c.Open(function)
		}
		return c.OpenToken(function, *token)
	}
	d := must(open(pf, nil))
	check(t, d.SetToken(token))
	shell(t, fmt.Sprintf("echo 1 >%s/%s/sriov_numvfs", devicesDir, pf))
	defer shell(t, fmt.Sprintf("echo 0 >%s/%s/sriov_numvfs", devicesDir, pf))
	vf := link(devicesDir, pf, "virtfn0")
	await(t, "the VF", func() bool { return link(devicesDir, vf, "driver") == "vfio-pci" })

	wrong := vfio.NewToken()
	for what, given := range map[string]*vfio.Token{"no token": nil, "a wrong token": &wrong} {
		if _, err := open(vf, given); !errors.Is(err, vfio.ErrToken) {
			t.Errorf("%s: %v", what, err)
		}
	}
	v := must(open(vf, &token))
	if err := v.SetToken(token); !errors.Is(err, vfio.ErrUnsupported) {
		t.Errorf("a VF has a token of its own: %v", err)
	}
	if r := run(t, viaduct, "verify", pf); r.status != 3 || !strings.Contains(r.stderr, "is open in process") {
		t.Errorf("verify of the PF: exit status %d, %s", r.status, r.stderr)
	}
	check(t, v.Close())
	check(t, d.Close())
}

// TestVFIOFunctions compares what VFIO says of a NIC's and an NVMe controller's VF with sysfs, and resets them.
func TestVFIOFunctions(t *testing.T) {
	h := openHost(t)
	for _, pf := range []string{of("8086", "10c9")[0], of("1b36", "0010")[0]} {
		nvme := attr(devicesDir, pf, "class") == "0x010802"
		withDriver(t, pf, map[bool]string{false: "igb", true: "nvme"}[nvme])
		shell(t, fmt.Sprintf("echo 0 >%s/%s/sriov_drivers_autoprobe; echo 1 >%[1]s/%[2]s/sriov_numvfs", devicesDir, pf))
		t.Cleanup(func() {
			shell(t, fmt.Sprintf("echo 0 >%s/%s/sriov_numvfs; echo 1 >%[1]s/%[2]s/sriov_drivers_autoprobe",
				devicesDir, pf))
		})
		vf := link(devicesDir, pf, "virtfn0")
		if vf == "" {
			t.Fatalf("%s has no VF", pf)
		}
		take(t, vf)
		eachWay(t, func(t *testing.T, way vfio.Way) {
			c := must(vfio.NewContext(h, vfio.Options{Way: way}))
			defer func() { check(t, c.Close()) }()
			d, err := c.Open(vf)
			if err != nil {
				t.Fatal(err)
			}
			sameAsSysfs(t, d, vf)
			must(must(d.Region(vfio.Config)).WriteAt([]byte{6, 0}, 4))
			var owned *vfio.NotOwnedError
			if err := d.HotReset(); !errors.As(err, &owned) ||
				!slices.ContainsFunc(owned.Members, func(a iommu.Address) bool {
					return a.String() == pf
				}) {
				t.Errorf("a hot reset that resets %s, on its home driver: %v", pf, err)
			}
			if nvme {
				check(t, d.Reset())
				return
			}

			// RXDCTL of the VF's queue, whose bit 25 enables it until a reset.
			const control, enable = 0x2828, 1 << 25
			regs := must(must(d.Region(vfio.BAR0)).Map())
			check(t, regs.Store32(control, enable))
			if got := must(regs.Load32(control)); got&enable == 0 {
				t.Errorf("RXDCTL is %#x", got)
			}
			check(t, d.Reset())
			if got := must(regs.Load32(control)); got&enable != 0 {
				t.Errorf("after a reset RXDCTL is %#x", got)
			}
		})
	}
}

// sameAsSysfs compares config space and regions with sysfs' config and resource.
func sameAsSysfs(t *testing.T, d *vfio.Device, function string) {
	t.Helper()
	want, err := os.ReadFile(filepath.Join(devicesDir, function, "config"))
	if err != nil {
		t.Fatal(err)
	}
	config := must(d.Region(vfio.Config))
	got := make([]byte, len(want))
	if _, err := config.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	// A VF's own ids are all ones: the kernel has the PF's, VFIO what they are to a guest.
	for i := range 64 {
		if i >= 0x10 && i < 0x28 || i < 8 || i == 0x3d || i == 0x3c { // BARs, ids and command, interrupt are virtual
			got[i] = want[i]
		}
	}
	if !bytes.Equal(got[:0x40], want[:0x40]) {
		t.Errorf("%s: config space\n%x\n%x", function, got[:0x40], want[:0x40])
	}

	for i, line := range strings.Split(attr(devicesDir, function, "resource"), "\n")[:6] {
		var first, last, flags uint64
		if _, err := fmt.Sscanf(line, "0x%x 0x%x 0x%x", &first, &last, &flags); err != nil {
			t.Fatal(err)
		}
		size := int64(0)
		if last > first {
			size = int64(last-first) + 1
		}
		if r := must(d.Region(vfio.BAR0 + i)); r.Size != size {
			t.Errorf("%s: BAR %d has %#x bytes, sysfs says %#x", function, i, r.Size, size)
		}
	}
}

// TestVFIOGroup opens two devices of one group, which a driver of the host must not have one of.
func TestVFIOGroup(t *testing.T) {
	h := openHost(t)
	var pair []string
	for _, n := range of("8086", "100e") {
		if len(names(devicesDir, n, "iommu_group/devices")) > 1 {
			pair = append(pair, n)
		}
	}
	take(t, pair[0])
	eachWay(t, func(t *testing.T, way vfio.Way) {
		c := must(vfio.NewContext(h, vfio.Options{Way: way}))
		defer func() { check(t, c.Close()) }()
		_, err := c.Open(pair[0])
		var viable *vfio.NotViableError
		if !errors.As(err, &viable) || len(viable.Members) != 1 || viable.Members[0].Address.String() != pair[1] {
			t.Errorf("a group with %s on its home driver: %v", pair[1], err)
		}
		if _, err := c.Open(pair[1]); !errors.Is(err, vfio.ErrNotBound) {
			t.Errorf("a device on its home driver: %v", err)
		}
	})

	take(t, pair[1])
	eachWay(t, func(t *testing.T, way vfio.Way) {
		c := must(vfio.NewContext(h, vfio.Options{Way: way}))
		defer func() { check(t, c.Close()) }()
		// What another process has one of can neither be opened nor, then, be reset.
		free := held(t, pair[1])
		if _, err := c.Open(pair[0]); !errors.Is(err, vfio.ErrInUse) {
			t.Errorf("a group that another process has: %v", err)
		}
		if r := run(t, viaduct, "verify", pair[0]); r.status != 3 || !strings.Contains(r.stderr, "is open in process") {
			t.Errorf("verify of it: exit status %d, %s", r.status, r.stderr)
		}
		free()
		first, second := must(c.Open(pair[0])), must(c.Open(pair[1]))
		other := must(vfio.NewContext(h, vfio.Options{Way: way}))
		defer func() { check(t, other.Close()) }()
		if _, err := other.Open(pair[1]); !errors.Is(err, vfio.ErrInUse) {
			t.Errorf("a device that is open in another context: %v", err)
		}

		dependents := must(first.HotResetInfo())
		var got []string
		for _, d := range dependents {
			got = append(got, d.Address.String())
			if !d.Owned {
				t.Errorf("%s is not owned", d.Address)
			}
		}
		if slices.Sort(got); !slices.Equal(got, pair) {
			t.Errorf("a hot reset resets %v, want %v", got, pair)
		}
		// RDTR, which a reset clears.
		const delay = 0x2820
		var regs []*vfio.Mapped
		for _, d := range []*vfio.Device{first, second} {
			must(must(d.Region(vfio.Config)).WriteAt([]byte{2, 0}, 4))
			regs = append(regs, must(must(d.Region(vfio.BAR0)).Map()))
			check(t, regs[len(regs)-1].Store32(delay, 0x1234))
		}
		check(t, first.HotReset())
		for i, d := range []*vfio.Device{first, second} {
			must(must(d.Region(vfio.Config)).WriteAt([]byte{2, 0}, 4))
			if got := must(regs[i].Load32(delay)); got != 0 {
				t.Errorf("%s: after a hot reset RDTR is %#x", d.Name(), got)
			}
		}
	})
}

// held has another process hold a group, until the test ends or free is called.
func held(t *testing.T, function string) (free func()) {
	t.Helper()
	return heldAs(t, "holder", function)
}

// heldAs is held by a process of a name.
func heldAs(t *testing.T, name, function string) (free func()) {
	t.Helper()
	program := filepath.Join(t.TempDir(), name)
	check(t, os.Symlink(must(exec.LookPath("sleep")), program))
	cmd := exec.Command("bash", "-c", `exec 3<>"$1"; echo held; exec "$2" 600`, "held", groupNode(function), program)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	free = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Cleanup(free)
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	// It has its name once it is the other program.
	await(t, "the holder", func() bool { return attr("/proc", strconv.Itoa(cmd.Process.Pid), "comm") == name })
	return free
}

// TestVFIOLeaks opens, maps, waits, resets and closes again and again: the process has no more files, goroutines and
// locked memory than before.
func TestVFIOLeaks(t *testing.T) {
	h := openHost(t)
	function := behindPort(t, of("1234", "11e8"))
	take(t, function)
	rounds := 50
	if os.Getenv("LAB_ROUNDS") != "15" {
		rounds = 1000
	}

	eachWay(t, func(t *testing.T, way vfio.Way) {
		memory := must(vfio.NewMemory(1<<20, 0))
		defer func() { check(t, memory.Close()) }()
		round := func() {
			c := must(vfio.NewContext(h, vfio.Options{Way: way}))
			defer func() { check(t, c.Close()) }()
			d := must(c.Open(function))
			check(t, c.Map(vfio.Mapping{IOVA: 1 << 20, Memory: memory, Access: vfio.ReadWrite}))
			i := must(d.Interrupts(vfio.MSI, 1))
			check(t, i.Trigger(0))
			must(i.Wait(context.Background(), 0))
			must(must(must(d.Region(vfio.BAR0)).Map()).Load32(0))
			check(t, d.Reset())
		}
		round()
		before := resources()
		for range rounds {
			round()
		}
		if after := resources(); after != before {
			t.Errorf("before:\n%safter %d rounds:\n%s", before, rounds, after)
		}
	})
}

// resources are what this process has open and locked.
func resources() string {
	var b strings.Builder
	fmt.Fprintln(&b, "files", len(names("/proc/self/fd")), "goroutines", runtime.NumGoroutine())
	for line := range strings.Lines(attr("/proc/self/status")) {
		for _, key := range []string{"VmLck", "VmPin"} {
			if strings.HasPrefix(line, key) {
				b.WriteString(line)
			}
		}
	}
	return b.String()
}

// mttyDevice makes a mediated device of the kernel's sample driver, whose state can be migrated.
func mttyDevice(t *testing.T, kind, uuid string) string {
	t.Helper()
	shell(t, "modprobe mtty && echo "+uuid+" >/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-"+kind+"/create")
	dir := "/sys/bus/mdev/devices/" + uuid
	t.Cleanup(func() { shell(t, "echo 1 >"+dir+"/remove") })
	return dir
}

// TestVFIOMigration moves the state of one device into another through every state.
func TestVFIOMigration(t *testing.T) {
	h := openHost(t)
	source := mttyDevice(t, "2", "8ce5d3a6-3e0c-4b0c-9d2e-5f1a7c1b2d3e")
	target := mttyDevice(t, "2", "8ce5d3a6-3e0c-4b0c-9d2e-5f1a7c1b2d3f")
	single := mttyDevice(t, "1", "8ce5d3a6-3e0c-4b0c-9d2e-5f1a7c1b2d40")
	eachWay(t, func(t *testing.T, way vfio.Way) {
		open := func(dir string) *vfio.Device {
			c := must(vfio.NewContext(h, vfio.Options{Way: way}))
			t.Cleanup(func() { check(t, c.Close()) })
			d, err := c.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		from, to, wrong := open(source), open(target), open(single)
		can := must(from.Migration())
		t.Logf("%+v, %d bytes", can, must(from.DataSize()))

		// A scratch register of each of its two ports.
		port := func(d *vfio.Device, n int) *vfio.Region { return must(d.Region(vfio.BAR0 + n)) }
		must(port(from, 0).WriteAt([]byte{0x5a}, 7))
		must(port(from, 1).WriteAt([]byte{0xa5}, 7))
		must(port(to, 0).WriteAt([]byte{0}, 7))

		state := new(bytes.Buffer)
		saving := must(from.Save())
		left := must(saving.PreCopy(t.Context(), state))
		if got := must(from.State()); can.PreCopy && got != vfio.StatePreCopy {
			t.Errorf("while it is saved it is in %s", got)
		}
		n := must(saving.Finish(t.Context(), state))
		if got := must(from.State()); got != vfio.StateStop || n != int64(state.Len()) {
			t.Errorf("%d of %d bytes, then %s; left after the first part %+v", state.Len(), n, got, left)
		}
		saved := bytes.Clone(state.Bytes())
		check(t, to.Load(t.Context(), state))
		must(to.SetState(vfio.StateRunning))
		for n, want := range []byte{0x5a, 0xa5} {
			b := []byte{0}
			must(port(to, n).ReadAt(b, 7))
			if b[0] != want {
				t.Errorf("port %d has %#x, want %#x", n, b[0], want)
			}
		}

		if err := wrong.Load(t.Context(), bytes.NewReader(saved)); err == nil {
			t.Error("a device with one port took the state of one with two")
		} else {
			t.Log(err)
		}
		if got := must(wrong.State()); got != vfio.StateRunning {
			t.Errorf("after a state that it did not take it is in %s", got)
		}
		must(from.SetState(vfio.StateRunning))
		eachArc(t, from, can, saved)

		state.Reset()
		saving = must(wrong.Save())
		must(saving.Finish(t.Context(), state))
		if err := to.Load(t.Context(), state); err == nil {
			t.Error("a device with two ports took the state of one with one")
		} else {
			t.Log(err)
		}
	})
}

// eachArc goes from each state to each, and compares with what Path says.
func eachArc(t *testing.T, d *vfio.Device, can vfio.Migration, saved []byte) {
	arcs := 0
	for from := vfio.StateError; from <= vfio.StatePreCopyP2P; from++ {
		for to := vfio.StateError; to <= vfio.StatePreCopyP2P; to++ {
			if _, err := can.Path(vfio.StateRunning, from); err != nil {
				continue // a state that it has not, and ERROR
			}
			stream, err := d.SetState(from)
			check(t, err)
			if from == vfio.StateResuming {
				must(stream.Write(saved))
			}
			again, err := d.SetState(to)
			_, want := can.Path(from, to)
			if (err == nil) != (want == nil) || want != nil && !errors.Is(err, vfio.ErrRefused) {
				t.Errorf("%s to %s: %v, want %v", from, to, err, want)
			}
			for _, s := range []*vfio.Stream{stream, again} {
				if s != nil {
					check(t, s.Close())
				}
			}
			check(t, d.Reset())
			arcs++
		}
	}
	t.Logf("%d arcs", arcs)
}
