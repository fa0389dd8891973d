package host

import "context"

// RunModprobe is Modprobe of a machine whose files are a test's.
func RunModprobe(ctx context.Context, h *Host, module string) error {
	return runModprobe(ctx, h.modprobe(), module)
}
