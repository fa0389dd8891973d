package vfio

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
)

const modprobePath = "/sbin/modprobe"

// modprobe loads a module by name or alias, with its dependencies and the administrator's options and blacklist, which is
// why it is not done by finit_module(2).
func modprobe(ctx context.Context, module string) error {
	out, err := exec.CommandContext(ctx, modprobePath, "--", module).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", modprobePath, module, err, strings.TrimSpace(string(out)))
	}
	return nil
}
