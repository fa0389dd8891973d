// Command vfiobench measures package vfio as hack/vfiobench.c measures the bare system calls: with the same arguments
// it does the same work, and prints the same lines. One more is mmio-read32-alone, reads that are made one by one.
//
//	vfiobench ADDRESS iommufd|container [INTERRUPTS [MIB]]
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
	"viaduct/vfio"
)

const (
	rounds     = 5
	roundsHuge = 25 // which take less long
	reads      = 1000
	timesRead  = 100
	warmUp     = 100
	page       = 4096
	huge       = 2 << 20
	iova       = 1 << 32 // beyond the window of MSIs

	command       = 4 // in the configuration space
	commandMemory = 2
	commandMaster = 4

	edu            = 0x11e81234 // its device and vendor id
	eduRaise       = 0x60
	eduAcknowledge = 0x64
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("vfiobench: ")
	count, mib := 2000, 1024
	for i, n := range []*int{&count, &mib} {
		if len(os.Args) > 3+i {
			*n, _ = strconv.Atoi(os.Args[3+i])
		}
	}
	if len(os.Args) < 3 || len(os.Args) > 5 || count < 1 || mib < 2 {
		log.Fatal("usage: vfiobench ADDRESS iommufd|container [INTERRUPTS [MIB]]")
	}
	if err := measure(os.Args[1], vfio.Way(os.Args[2]), count, mib<<20); err != nil {
		log.Fatal(err)
	}
}

// measure opens the device, measures all, and closes it.
func measure(address string, way vfio.Way, count, length int) (err error) {
	h, err := iommu.Open("/")
	if err != nil {
		return err
	}
	defer h.Close()
	c, err := vfio.NewContext(h, vfio.Options{Way: way})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	d, err := c.Open(address)
	if err != nil {
		return err
	}

	if err := measureMemory(c, "4k", length, 0, rounds); err != nil {
		return err
	}
	if err := measureMemory(c, "2m", length, huge, roundsHuge); err != nil {
		return err
	}
	ids, err := letItWork(d)
	if err != nil {
		return err
	}
	r, err := d.Region(vfio.BAR0)
	if err != nil {
		return err
	}
	bar, err := r.Map()
	if err != nil {
		return err
	}
	if err := measureReads(bar); err != nil {
		return err
	}
	return measureInterrupts(d, bar, ids == edu, count)
}

// measureMemory maps memory of pages of a size, each of which was touched, and unmaps it.
func measureMemory(c *vfio.Context, of string, length, pageSize, rounds int) (err error) {
	m, err := vfio.NewMemory(length, pageSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	// A kernel without transparent huge pages says EINVAL.
	if err := unix.Madvise(m.Bytes(), unix.MADV_NOHUGEPAGE); pageSize == 0 && err != nil && err != unix.EINVAL {
		return err
	}
	for b := m.Bytes(); len(b) > 0; b = b[page:] {
		b[0] = 1
	}

	mapping, unmapping := make([]time.Duration, rounds), make([]time.Duration, rounds)
	for i := range rounds {
		start := time.Now()
		if err := c.Map(vfio.Mapping{IOVA: iova, Memory: m, Access: vfio.ReadWrite}); err != nil {
			return err
		}
		mapped := time.Now()
		if err := c.Unmap(iova, uint64(length)); err != nil {
			return err
		}
		unmapping[i] = time.Since(mapped)
		mapping[i] = mapped.Sub(start)
	}
	line("map-"+of, mapping)
	line("unmap-"+of, unmapping)
	return nil
}

// line prints the best, and all.
func line(name string, values []time.Duration) {
	fmt.Print(name, " ", slices.Min(values).Nanoseconds())
	for _, v := range values {
		fmt.Print(" ", v.Nanoseconds())
	}
	fmt.Println()
}

// letItWork has the device do DMA, which an MSI is as well, and returns its ids: at open the kernel forbids it.
func letItWork(d *vfio.Device) (ids uint32, err error) {
	config, err := d.Region(vfio.Config)
	if err != nil {
		return 0, err
	}
	b := make([]byte, command+2)
	if _, err = config.ReadAt(b, 0); err != nil {
		return 0, err
	}
	b[command] |= commandMemory | commandMaster
	_, err = config.WriteAt(b[command:], command)
	return binary.LittleEndian.Uint32(b), err
}

func measureReads(bar *vfio.Mapped) error {
	err := measureRead("mmio-read32", func() error {
		return bar.Batch(func(r vfio.Registers) error {
			for range reads {
				r.Load32(0)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	return measureRead("mmio-read32-alone", func() error {
		for range reads {
			if _, err := bar.Load32(0); err != nil {
				return err
			}
		}
		return nil
	})
}

func measureRead(name string, do func() error) error {
	var times []time.Duration
	for range timesRead {
		start := time.Now()
		if err := do(); err != nil {
			return err
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	fmt.Printf("%s %.1f\n", name, float64(times[timesRead/2].Nanoseconds())/reads)
	return nil
}

// kind is MSI-X, or MSI if the device has no MSI-X.
func kind(d *vfio.Device) (vfio.Kind, error) {
	for _, k := range []vfio.Kind{vfio.MSIX, vfio.MSI} {
		if info, err := d.InterruptInfo(k); err != nil || info.Count > 0 {
			return k, err
		}
	}
	return 0, errors.New("the device has neither MSI nor MSI-X")
}

func measureInterrupts(d *vfio.Device, bar *vfio.Mapped, isEdu bool, count int) error {
	k, err := kind(d)
	if err != nil {
		return err
	}
	interrupts, err := d.Interrupts(k, 1)
	if err != nil {
		return err
	}
	name := "interrupt-loopback"
	raise := func() error { return interrupts.Trigger(0) }
	acknowledge := func() error { return nil }
	if isEdu {
		name = "interrupt"
		raise = func() error { return bar.Store32(eduRaise, 1) }
		acknowledge = func() error { return bar.Store32(eduAcknowledge, 1) }
	}
	// One that can end, as a driver's does.
	ctx, stop := context.WithTimeout(context.Background(), 5*time.Minute)
	defer stop()

	var times []time.Duration
	for i := -warmUp; i < count; i++ {
		start := time.Now()
		if err := raise(); err != nil {
			return err
		}
		n, err := interrupts.Wait(ctx, 0)
		took := time.Since(start)
		if err != nil {
			return err
		}
		if n != 1 {
			return fmt.Errorf("%d interrupts for one", n)
		}
		if err := acknowledge(); err != nil {
			return err
		}
		if i >= 0 {
			times = append(times, took)
		}
	}
	slices.Sort(times)
	fmt.Println(name, times[count/2].Nanoseconds())
	return nil
}
