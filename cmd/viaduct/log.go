package main

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/changelog"
	"viaduct/cmd/internal/terminal"
	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

func logCommand(e *env) *cli.Command {
	var lines int
	return command(&cli.Command{
		Name:      "log",
		Usage:     "show what viaduct changed on this host, when, and for whom",
		ArgsUsage: "[SELECTOR|GUEST...]",
		Description: "Each change is a line: of the driver of a device, the VFs of a PF, or the settings of a VF; " +
			"and so is each command that failed or was refused. The file is bounded, and its oldest lines go first. " +
			"The journal of the system has the same lines (`journalctl -t viaduct`).\n\n" +
			"Examples:\n  viaduct log\n" +
			"  viaduct log enp1s0 web\n" +
			"  viaduct log --lines 0 --json",
		Flags: []cli.Flag{
			&cli.IntFlag{
				Name: "lines", Aliases: []string{"n"}, Value: 20, Destination: &lines,
				Usage: "show the last `N` lines; 0 is all",
			},
			e.jsonFlag(),
		},
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) error {
			if lines < 0 {
				return usagef("log: --lines %d: want 0 or more", lines)
			}
			return runLog(e, c.Args().Slice(), lines)
		},
	})
}

func runLog(e *env, words []string, lines int) error {
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	all, err := changelog.Read(h)
	if err != nil {
		return err
	}
	if all, err = e.about(h, all, words); err != nil {
		return err
	}
	if lines > 0 && len(all) > lines {
		all = all[len(all)-lines:]
	}
	if e.json {
		e.printJSON(append([]changelog.Entry{}, all...))
		return nil
	}
	if len(all) == 0 {
		e.note("nothing is written down in /%s%s", changelog.File, map[bool]string{true: " of that"}[len(words) > 0])
		return nil
	}

	t := &terminal.Table{Shrink: []terminal.Shrink{{Column: 3, Least: 12}}, Wrap: true}
	head := terminal.Cells("TIME", "USER", "DEVICE", "COMMAND", "WHAT")
	for i := range head.Cells {
		head.Cells[i].Style = terminal.Bold
	}
	t.Rows = append(t.Rows, head)
	for _, entry := range all {
		what, command, style := entry.Text(), strings.TrimPrefix(entry.Command, "viaduct "), terminal.Plain
		if entry.Device == nil {
			what = string(entry.Result)
		}
		if entry.Result != changelog.Done {
			style = terminal.Bad
			what = string(entry.Result) + ": " + cmp.Or(ptr(entry.Error), what)
		}
		row := terminal.Cells(when(entry.Time), entry.User, ptr(entry.Device), command, what)
		row.Cells[4].Style = style
		t.Rows = append(t.Rows, row)
	}
	e.print(t)
	return nil
}

func when(t time.Time) string { return t.Local().Format(time.DateTime) }

// about are the entries of the devices that words name, or of commands that have a word in them, as a guest's name.
func (e *env) about(h *iommu.Host, all []changelog.Entry, words []string) ([]changelog.Entry, error) {
	if len(words) == 0 {
		return all, nil
	}
	t, err := iommu.Scan(h)
	if err != nil {
		return nil, err
	}
	devices := map[string]bool{}
	for _, w := range words {
		sel, err := iommu.ParseArgument(w)
		if err != nil {
			return nil, err
		}
		// What is not there now may be written down.
		devices[w], devices["0000:"+w] = true, true
		found, err := sel.Resolve(h, t)
		if err != nil && !errors.Is(err, iommu.ErrNotFound) {
			return nil, err
		}
		for _, d := range found {
			devices[d.Name] = true
		}
	}
	return slices.DeleteFunc(all, func(entry changelog.Entry) bool {
		named := func(field string) bool { return slices.Contains(words, field) || devices[field] }
		return !devices[ptr(entry.Device)] && !slices.ContainsFunc(strings.Fields(entry.Command), named)
	}), nil
}

// told is what becomes of an event of a Handle: it is shown, and when it is over written down.
func (e *env) told(h *iommu.Host) func(bind.Event) {
	user := sync.OnceValue(func() string { return userName(h) })
	// Each that waits for the file's lock would take a thread.
	var one sync.Mutex
	return func(event bind.Event) {
		e.progress.see(event)
		if !event.Begins && !event.Part {
			one.Lock()
			defer one.Unlock()
			e.log(h, user(), changelog.Of(event))
		}
	}
}

// log writes an entry down. That it cannot be, as on a host whose disk is read-only, stops nothing.
func (e *env) log(h *iommu.Host, user string, entry changelog.Entry) {
	entry.Time, entry.PID, entry.UID = time.Now(), os.Getpid(), os.Getuid()
	entry.User, entry.Command = user, e.commandLine
	if h.Real() {
		changelog.Send(entry)
	}
	err := changelog.Append(h, entry)
	if err != nil && !errors.Is(err, unix.EROFS) && !errors.Is(err, fs.ErrPermission) {
		e.note("what was changed is not written down: %v", err)
	}
}

// logFailure writes down that a command that changes the host was refused or failed.
func (e *env) logFailure(err error) {
	if !e.changes {
		return
	}
	h, opened := e.open()
	if opened != nil {
		return
	}
	defer h.Close()
	text := err.Error()
	entry := changelog.Entry{Result: changelog.Failed, Error: &text}
	if errors.Is(err, holder.ErrRefused) || errors.Is(err, holder.ErrBlind) {
		entry.Result = changelog.Refused
	}
	e.log(h, userName(h), entry)
}

// userName is who logged in for this, also behind sudo; else who this runs as.
func userName(h *iommu.Host) string {
	id := strconv.Itoa(os.Getuid())
	// 2^32-1 is nobody's, as of a service.
	if login, err := h.String("proc/self/loginuid"); err == nil && login != "4294967295" {
		id = login
	} else if err != nil && !host.Absent(err) {
		return id
	}
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}
