package install

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/vfio/holder"
)

// Trusted refuses a program that somebody else than root could replace, as units and hooks are going to run it as root:
// the file, a link on the way to it, or a folder above it is another user's, or may be written to by others. The error
// matches holder.ErrRefused.
func Trusted(program string) error {
	real, err := filepath.EvalSymlinks(program)
	if err != nil {
		return err
	}

	refused := &holder.RefusedError{
		What: "install " + program, Hint: "put it where only root can write, e.g. /usr/local/sbin",
	}

	reason := func(format string, a ...any) {
		why := holder.Reason{Kind: holder.Program, Text: fmt.Sprintf(format, a...)}
		refused.Reasons = append(refused.Reasons, why)
	}

	for _, file := range []string{real, program} {
		for {
			var st unix.Stat_t
			if err := unix.Lstat(file, &st); err != nil {
				return &os.PathError{Op: "lstat", Path: file, Err: err}
			}
			link := st.Mode&unix.S_IFMT == unix.S_IFLNK
			switch {
			case st.Uid != 0:
				reason("%s belongs to user %d, who could replace it", file, st.Uid)
			case st.Mode&0o022 != 0 && !link:
				reason("others may write to %s (mode %04o)", file, st.Mode&0o7777)
			}
			if len(refused.Reasons) > 0 {
				return refused
			}
			if file == "/" {
				break
			}
			file = filepath.Dir(file)
		}
	}

	return nil
}

// inUnit is a path as a word of a systemd unit (systemd.service(5), systemd.syntax(7)), whatever is in it.
func inUnit(path string) string {
	escaped := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%").Replace(path)
	if escaped == path && !strings.ContainsAny(path, " \t'$;#") {
		return path
	}
	return `"` + escaped + `"`
}
