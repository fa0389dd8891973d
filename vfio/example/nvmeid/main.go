// Command nvmeid reads what an NVMe controller says of itself, from user space: it opens the controller through VFIO,
// gives it an admin queue in memory that it maps for it, and has it write its identity there by DMA. The controller, or
// a VF of one, has to be on vfio-pci, and in use by nobody:
//
//	viaduct bind 0000:01:00.0
//	go run ./vfio/example/nvmeid 0000:01:00.0
//
// It shows how package vfio is used: a context, memory, a mapped BAR, an interrupt. The registers and commands are
// those of the NVM Express base specification, chapters 3.1 and 5.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"viaduct/iommu"
	"viaduct/vfio"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: nvmeid ADDRESS")
		os.Exit(2)
	}
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	if err := run(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "nvmeid:", err)
		os.Exit(1)
	}
}

// Registers of a controller, in BAR 0.
const (
	regCAP  = 0x00 // capabilities
	regCC   = 0x14 // configuration
	regCSTS = 0x1c // status
	regAQA  = 0x24 // sizes of the admin queues
	regASQ  = 0x28 // where the admin submission queue is
	regACQ  = 0x30 // where the admin completion queue is
	regSQ0  = 0x1000

	ready, fatal = 1 << 0, 1 << 1 // of the status
)

// What is where in the memory that the controller reaches, from iova on.
const (
	iova        = 1 << 20
	submissions = 0
	completions = 4096
	identity    = 8192
	total       = 3 * 4096
)

func run(ctx context.Context, address string) (err error) {
	host, err := iommu.Open("/")
	if err != nil {
		return err
	}
	defer host.Close()
	space, err := vfio.NewContext(host, vfio.Options{})
	if err != nil {
		return err
	}
	memory, err := vfio.NewMemory(total, 0)
	if err != nil {
		return err
	}
	// In this order: closing the context ends all that the controller may do with the memory.
	defer func() { err = errors.Join(err, space.Close(), memory.Close()) }()
	device, err := space.Open(address)
	if err != nil {
		return err
	}
	if err := space.Map(vfio.Mapping{IOVA: iova, Memory: memory, Access: vfio.ReadWrite}); err != nil {
		return err
	}

	if err := enableDMA(device); err != nil {
		return err
	}
	bar, err := device.Region(vfio.BAR0)
	if err != nil {
		return err
	}
	regs, err := bar.Map()
	if err != nil {
		return err
	}
	interrupts, err := device.Interrupts(vfio.MSIX, 1)
	if err != nil {
		return err
	}
	if err := start(ctx, regs); err != nil {
		return err
	}
	if err := identify(ctx, regs, interrupts, memory.Bytes()); err != nil {
		return err
	}

	id := memory.Bytes()[identity:]
	text := func(from, to int) string { return strings.TrimSpace(string(id[from:to])) }
	_, err = fmt.Printf("by %s: vendor %04x, serial %s, model %s, firmware %s\n",
		space.Way(), binary.LittleEndian.Uint16(id), text(4, 24), text(24, 64), text(64, 72))
	return err
}

// enableDMA lets the device decode its memory and begin transfers: VFIO opens it with both off.
func enableDMA(d *vfio.Device) error {
	config, err := d.Region(vfio.Config)
	if err != nil {
		return err
	}
	command := make([]byte, 2)
	if _, err := config.ReadAt(command, 4); err != nil {
		return err
	}
	command[0] |= 1<<1 | 1<<2
	_, err = config.WriteAt(command, 4)
	return err
}

// start resets the controller, gives it its admin queues, of two entries each, and waits until it is ready.
func start(ctx context.Context, regs *vfio.Mapped) error {
	if err := regs.Store32(regCC, 0); err != nil {
		return err
	}
	if err := await(ctx, regs, 0); err != nil {
		return err
	}
	err := errors.Join(
		regs.Store32(regAQA, 1<<16|1),
		regs.Store64(regASQ, iova+submissions),
		regs.Store64(regACQ, iova+completions),
		// Entries of 64 and 16 bytes, pages of 4 KiB.
		regs.Store32(regCC, 4<<20|6<<16|1),
	)
	if err != nil {
		return err
	}
	return await(ctx, regs, ready)
}

// await waits until the controller is ready, or is no more.
func await(ctx context.Context, regs *vfio.Mapped, want uint32) error {
	for {
		status, err := regs.Load32(regCSTS)
		switch {
		case err != nil:
			return err
		case status&ready == want:
			return nil
		case status&fatal != 0:
			return fmt.Errorf("the controller failed, with status %#x", status)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the controller's status is %#x: %w", status, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// identify sends the command Identify, and waits for the interrupt of its completion.
func identify(ctx context.Context, regs *vfio.Mapped, interrupts *vfio.Interrupts, memory []byte) error {
	command := memory[submissions : submissions+64]
	binary.LittleEndian.PutUint32(command, 0x06)
	binary.LittleEndian.PutUint64(command[24:], iova+identity)
	binary.LittleEndian.PutUint32(command[40:], 1) // the controller
	if err := regs.Store32(regSQ0, 1); err != nil {
		return err
	}
	if _, err := interrupts.Wait(ctx, 0); err != nil {
		return err
	}

	capabilities, err := regs.Load64(regCAP)
	if err != nil {
		return err
	}
	status := binary.LittleEndian.Uint16(memory[completions+14:])
	if status&1 != 1 || status>>1 != 0 {
		return fmt.Errorf("identify ended with status %#x", status>>1)
	}
	// The controller has seen the completion when its doorbell is rung.
	doorbell := int64(regSQ0 + 4<<(capabilities>>32&0xf))
	return regs.Store32(doorbell, 1)
}
