package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

func snapshotCommand(e *env) *cli.Command {
	var redact bool
	return command(&cli.Command{
		Name:      "snapshot",
		Usage:     "write everything viaduct reads of this host to one file",
		ArgsUsage: "FILE|-",
		Description: "With `--host FILE`, every command that only reads works on this file, on any machine. A file " +
			"that exists is never overwritten. The file holds MAC addresses and serial numbers, which `--redact` " +
			"masks, and who uses devices, which it leaves out. A snapshot that root takes is complete; that of " +
			"another user lacks configuration space, the firmware's tables, and more.\n\n" +
			"Examples:\n  viaduct snapshot host.tar.gz\n" +
			"  viaduct --host host.tar.gz list --tree\n" +
			"  ssh host viaduct snapshot --redact - > host.tar.gz",
		Flags: []cli.Flag{
			&cli.BoolFlag{
				Name: "redact", Destination: &redact,
				Usage: "mask MAC addresses, GUIDs and serial numbers, leave out who uses devices, and keep of the " +
					"kernel command line only what is about devices",
			},
		},
		Action: func(c *cli.Context) error {
			file, err := oneArgument(c, "the file to write")
			if err != nil {
				return err
			}
			return runSnapshot(c.Context, e, file, redact)
		},
	})
}

func runSnapshot(ctx context.Context, e *env, file string, redact bool) (err error) {
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	capture := iommu.Capture
	if redact {
		capture = iommu.CaptureRedacted
	}
	defer func() {
		if err == nil && !redact {
			e.note("the snapshot holds MAC addresses, serial numbers, the kernel command line, the declared host, " +
				"who uses devices and the log of changes: --redact leaves out what tells this host from others")
		}
	}()
	if file == "-" && e.screen.Width > 0 {
		return usagef("snapshot: standard output is a terminal; want a file, or a pipe")
	}
	if _, err := os.Lstat(file); err == nil && file != "-" {
		return &fs.PathError{Op: "snapshot", Path: file, Err: fs.ErrExist}
	}
	facts, err := e.snapshotFacts(h, redact)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", file, err)
	}
	if file == "-" {
		w := bufio.NewWriter(e.screen)
		return errors.Join(capture(h, w, facts...), w.Flush())
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".viaduct-snapshot-*")
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", file, err)
	}

	defer func() {
		if e := os.Remove(tmp.Name()); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}()
	ctx, stop := untilSignal(ctx)
	defer stop()
	w := bufio.NewWriter(untilDone{ctx, tmp})
	if err := errors.Join(capture(h, w, facts...), w.Flush(), tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("snapshot %s: %w", file, err)
	}

	// Whole under its name or not there: and, unlike rename(2), never in the place of a file that came meanwhile.
	err = unix.Renameat2(unix.AT_FDCWD, tmp.Name(), unix.AT_FDCWD, file, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// NFS has no such rename, but links.
		err = unix.Link(tmp.Name(), file)
	}
	if err != nil {
		return &fs.PathError{Op: "snapshot", Path: file, Err: err}
	}
	return nil
}

// untilDone is a writer that fails once the context has ended.
type untilDone struct {
	ctx context.Context
	w   io.Writer
}

func (u untilDone) Write(b []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return u.w.Write(b)
}
