package vfio

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

const modprobePath = "/sbin/modprobe"

// modprobe loads a module by name, or those of an alias less what the administrator's files blacklist, with dependencies and
// options, which is why it is not done by finit_module(2).
func modprobe(ctx context.Context, module string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, modprobePath, modprobeArgs(module)...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", modprobePath, module, err, strings.TrimSpace(string(out)))
	}
	return nil
}

func modprobeArgs(module string) []string {
	if isAlias(module) {
		return []string{"-b", "--", module}
	}
	return []string{"--", module}
}

func isAlias(module string) bool { return strings.Contains(module, ":") }
