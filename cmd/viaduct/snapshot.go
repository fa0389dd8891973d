package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

func snapshotCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:      "snapshot",
		Usage:     "write what viaduct sees of this host into one file",
		ArgsUsage: "FILE",
		Description: "With --host FILE, list, show and the other commands that only look work on it, on any machine. It holds MAC addresses and\n" +
			"serial numbers; written by root it is complete, by others it lacks config space and firmware tables. A file that exists\n" +
			"is never overwritten.\n\nExamples:\n  viaduct snapshot host.tar.gz\n  viaduct --host host.tar.gz list --tree",
		Action: func(c *cli.Context) error {
			file, err := oneArgument(c, "the file to write")
			if err != nil {
				return err
			}
			return runSnapshot(e, file)
		},
	})
}

func runSnapshot(e *env, file string) (err error) {
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	if _, err := os.Lstat(file); err == nil {
		return &fs.PathError{Op: "snapshot", Path: file, Err: fs.ErrExist}
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
	w := bufio.NewWriter(tmp)
	if err := errors.Join(iommu.Capture(h, w), w.Flush(), tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("snapshot %s: %w", file, err)
	}
	// Whole under its name or not there: and, unlike rename(2), never in the place of a file that came meanwhile.
	if err := unix.Renameat2(unix.AT_FDCWD, tmp.Name(), unix.AT_FDCWD, file, unix.RENAME_NOREPLACE); err != nil {
		return &fs.PathError{Op: "snapshot", Path: file, Err: err}
	}
	return nil
}
