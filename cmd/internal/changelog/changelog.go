// Package changelog keeps what viaduct changed on a host: who did what, when, and what came of it. It is a bounded file
// of JSON lines, and the system's journal has the same.
package changelog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// The files, below the host's root: the newest lines, and those before them.
const (
	File  = "var/lib/viaduct/log.jsonl"
	older = File + ".1"
)

// most is how long a file may become, in bytes: some two thousand changes.
const most = 512 << 10

// Result is what came of a change.
type Result string

// The results.
const (
	Done    Result = "done"
	Failed  Result = "failed"
	Refused Result = "refused" // nothing was touched
)

// Entry is one change, or one command that was refused or failed.
type Entry struct {
	Time    time.Time    `json:"time"`
	User    string       `json:"user"`
	UID     int          `json:"uid"`
	PID     int          `json:"pid"`
	Command string       `json:"command"`
	Device  *string      `json:"device"`  // null of a command as a whole
	Subject bind.Subject `json:"subject"` // "" of a command as a whole
	From    *string      `json:"from"`
	To      *string      `json:"to"`
	Result  Result       `json:"result"`
	Error   *string      `json:"error"`
}

// Of is the entry of an event.
func Of(e bind.Event) Entry {
	out := Entry{Device: &e.Device, Subject: e.Subject, Result: Done}
	if e.From != "" {
		out.From = &e.From
	}
	if e.To != "" {
		out.To = &e.To
	}
	if e.Err != nil {
		text := e.Err.Error()
		out.Result, out.Error = Failed, &text
	}
	return out
}

// Text is what was changed, in words.
func (e *Entry) Text() string {
	word := func(s *string) string {
		if s == nil {
			return "none"
		}
		return *s
	}
	switch e.Subject {
	case bind.Driver:
		return "driver " + word(e.From) + " -> " + word(e.To)
	case bind.VFs:
		return word(e.From) + " -> " + word(e.To) + " VFs"
	case bind.Settings:
		return word(e.To) + " (was " + word(e.From) + ")"
	}
	return e.Command
}

// Append adds an entry. A file that has become long enough is kept as the older one, in the place of that which was.
func Append(h *iommu.Host, e Entry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	file := h.Path(File)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	f, err := open(file)
	if err != nil {
		return err
	}
	defer f.Close()

	if st, err := f.Stat(); err == nil && st.Size() > most {
		if err := os.Rename(file, h.Path(older)); err != nil {
			return err
		}
		next, err := open(file)
		if err != nil {
			return err
		}
		defer next.Close()
		f = next
	}
	_, err = f.Write(append(line, '\n'))
	return err
}

// open opens the file, and keeps it from others until it is closed: they would take away what is written to.
func open(file string) (*os.File, error) {
	for {
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		mine, err1 := f.Stat()
		there, err2 := os.Stat(file)
		if err := errors.Join(err, err1); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if err2 == nil && os.SameFile(mine, there) {
			return f, nil
		}
		// It became the older one meanwhile.
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
}

// Read returns all entries, the oldest first. A line that cannot be read, as the last of a host that lost power, is
// left out.
func Read(h *iommu.Host) ([]Entry, error) {
	var out []Entry
	for _, file := range []string{older, File} {
		text, err := h.Read(file)
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, parse(text)...)
	}
	return out, nil
}

// parse reads the entries of a file.
func parse(text []byte) []Entry {
	var out []Entry
	for line := range bytes.Lines(text[max(len(text)-2*most, 0):]) {
		var e Entry
		if json.Unmarshal(line, &e) == nil && !e.Time.IsZero() {
			out = append(out, e)
		}
	}
	return out
}

// Command is a command line as it is kept: without the command that viaduct run starts, which may hold secrets.
func Command(args []string) string {
	for i, a := range args {
		if a == "--" {
			return strings.Join(args[:i], " ") + " -- ..."
		}
	}
	return strings.Join(args, " ")
}

// Send gives an entry to the system's journal, where there is one (systemd.journal-fields(7); the protocol is
// https://systemd.io/JOURNAL_NATIVE_PROTOCOL).
func Send(e Entry) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	_ = unix.Sendto(fd, e.message(), 0, &unix.SockaddrUnix{Name: "/run/systemd/journal/socket"})
}

// message is the entry as the journal takes it: a line for each field.
func (e *Entry) message() []byte {
	text := e.Text()
	priority := 6 // of syslog(3): informational
	if e.Device != nil {
		text = *e.Device + ": " + text + " (" + e.Command + ")"
	}
	if e.Error != nil {
		text, priority = text+": "+*e.Error, 4
	}
	var b bytes.Buffer
	add := func(key, value string) {
		fmt.Fprintf(&b, "%s=%s\n", key, strings.ReplaceAll(value, "\n", "; "))
	}
	add("MESSAGE", text)
	add("PRIORITY", fmt.Sprint(priority))
	add("SYSLOG_IDENTIFIER", "viaduct")
	add("VIADUCT_COMMAND", e.Command)
	add("VIADUCT_RESULT", string(e.Result))
	if e.Device != nil {
		add("VIADUCT_DEVICE", *e.Device)
	}
	return b.Bytes()
}
