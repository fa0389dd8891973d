package host

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// ModprobePath is the program that loads modules where the kernel names none.
const ModprobePath = "/sbin/modprobe"

// Modprobe is the program that the kernel itself would run to load a module: distributions without /sbin name another.
func (h *Host) modprobe() string {
	if program, err := h.String("proc/sys/kernel/modprobe"); err == nil && strings.HasPrefix(program, "/") {
		return program
	}
	return ModprobePath
}

// ModprobeArgs are the arguments of modprobe for a module, or for an alias, of which what is blacklisted is left out.
func ModprobeArgs(module string) []string {
	if strings.Contains(module, ":") {
		return []string{"-b", "--", module}
	}
	return []string{"--", module}
}

func (m machine) Modprobe(ctx context.Context, module string) error {
	h := Host{Dir: Dir{tree: m.root, path: "/"}}
	return runModprobe(ctx, h.modprobe(), module)
}

// runModprobe does not wait for a program that the kernel does not let go of: it may hang for good in a module's
// initialisation.
func runModprobe(ctx context.Context, program, module string) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, program, ModprobeArgs(module)...)
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, time.Second
	// Not this program's, whose MODPROBE_OPTIONS may be somebody else's.
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%s %s: %w", program, module, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()

	select {
	case err := <-done:
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w: %s", program, module, err, strings.TrimSpace(out.String()))
		}
		return nil
	case <-ctx.Done():
		// It was killed just now, and ends with that unless the kernel holds it.
		select {
		case err := <-done:
			if err != nil {
				err = fmt.Errorf("%s %s: %w", program, module, ctx.Err())
			}
			return err
		case <-time.After(2 * cmd.WaitDelay):
			return fmt.Errorf("%s %s: %w; it hangs in the kernel (process %d)", program, module, ctx.Err(),
				cmd.Process.Pid)
		}
	}
}
