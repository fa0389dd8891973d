package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/migrate"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// migrateOptions are what migrate is asked for.
type migrateOptions struct {
	guest, to string
	by        string
	wish      migrate.Wish
	check     bool
}

func migrateCommand(e *env) *cli.Command {
	var o migrateOptions
	return command(&cli.Command{
		Name:      "migrate",
		Usage:     "move a running guest with its devices to another host",
		ArgsUsage: "GUEST --to HOST",
		Description: "With --check, report whether the guest is ready for that host: each line says ok, warn, refuse or unknown, and what was read.\n" +
			"HOST may then be a snapshot, and --host another one. Exit status: 0 when nothing refuses, 3 when something does.\n\n" +
			"Examples:\n  viaduct --host a.snapshot migrate web --to b.snapshot --check",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "to", Usage: "the other `HOST`; with --check also a snapshot", Destination: &o.to},
			&cli.BoolFlag{Name: "check", Usage: "only report whether the guest is ready", Destination: &o.check},
			&cli.StringFlag{Name: "from", Usage: "draw from this `POOL` of the other host (default: the name of the one here)", Destination: &o.wish.Pool},
			&cli.StringFlag{Name: "by", Usage: "how the devices move: `failover|vfio|replug` (default: what costs the guest least)", Destination: &o.by},
			e.jsonFlag(),
		},
		BashComplete: e.completeGuests,
		Action: func(c *cli.Context) (err error) {
			if o.guest, err = oneArgument(c, "the guest's name"); err != nil {
				return err
			}
			if err := o.parse(); err != nil {
				return err
			}
			return runMigrateCheck(e, &o)
		},
	})
}

// parse reads what the flags say.
func (o *migrateOptions) parse() error {
	if err := lease.CheckGuest(o.guest); err != nil {
		return usageError{err}
	}
	switch o.wish.By = migrate.Way(o.by); o.wish.By {
	case "", migrate.ByFailover, migrate.ByVFIO, migrate.ByReplug:
	default:
		return usagef("migrate: --by %q: want failover, vfio or replug", o.by)
	}
	if o.to == "" {
		return usagef("migrate: to which host? (--to)")
	}
	if !o.check {
		return usagef("migrate: only --check is there so far")
	}
	return nil
}

// runMigrateCheck reports whether a guest is ready for another host.
func runMigrateCheck(e *env, o *migrateOptions) error {
	g, here, err := e.guestFacts(o.guest)
	if err != nil {
		return err
	}
	there, err := e.factsOf(o.to)
	if err != nil {
		return err
	}
	return e.tellReport(migrate.Check(g, here, there, o.wish))
}

// guestFacts reads a guest and its host.
func (e *env) guestFacts(name string) (*migrate.Guest, *migrate.Facts, error) {
	m, stop, err := e.lookWithLeases()
	if err != nil {
		return nil, nil, err
	}
	defer stop()
	g, err := migrate.ReadGuest(m, name)
	if err != nil {
		return nil, nil, err
	}
	f, err := e.facts(m)
	return g, f, err
}

// factsOf reads another captured host.
func (e *env) factsOf(name string) (*migrate.Facts, error) {
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		return nil, usagef("migrate: --to %s: there is no such snapshot", name)
	}
	other := *e
	other.hostName, other.openHost = name, iommu.Open
	m, stop, err := other.lookWithLeases()
	if err != nil {
		return nil, err
	}
	defer stop()
	return other.facts(m)
}

// lookWithLeases opens a host for a look at what concerns leases; the caller calls stop at the end.
func (e *env) lookWithLeases() (m *lease.Manager, stop func(), err error) {
	stop, s, err := e.openLook()
	if err != nil {
		return nil, nil, err
	}
	declaration, err := hostfile.Load(s.Host())
	if err != nil {
		stop()
		return nil, nil, usageError{err}
	}
	if m, err = lease.New(s, lease.Options{Declaration: declaration}); err != nil {
		stop()
		return nil, nil, err
	}
	return m, stop, nil
}

// facts reads a host's facts, under the name that the user has for it.
func (e *env) facts(m *lease.Manager) (*migrate.Facts, error) {
	declaration, err := hostfile.Load(m.Host())
	if err != nil {
		return nil, usageError{err}
	}
	name := "this host"
	if e.hostName != "" && e.hostName != "/" {
		name = filepath.Base(e.hostName)
	}
	return migrate.Read(m, declaration, name)
}

// tellReport prints what a check found; a refusal is an error.
func (e *env) tellReport(r *migrate.Report) error {
	if e.json {
		if err := writeJSON(e.stdout, r); err != nil {
			return err
		}
	} else if err := e.writeReport(r); err != nil {
		return err
	}
	if r.Ready {
		return nil
	}
	refused := &holder.RefusedError{What: fmt.Sprintf("move %s to %s", r.Guest, r.To)}
	for _, l := range r.Lines {
		if l.Result == migrate.Refuse {
			refused.Reasons = append(refused.Reasons, holder.Reason{Kind: holder.Unsuitable, Text: l.Check})
		}
	}
	return refused
}

// writeReport writes a report for people, in lines of 80 columns.
func (e *env) writeReport(r *migrate.Report) error {
	w := bufio.NewWriter(e.stdout)
	fmt.Fprintf(w, "%s from %s to %s, by %s\n", r.Guest, r.From, r.To, r.By)
	for _, l := range r.Lines {
		head := fmt.Sprintf("%-8s %-15s ", l.Result, l.Check)
		for _, line := range fold(fmt.Sprintf("%s [%s]", l.What, l.Where), 80-len(head)) {
			fmt.Fprintln(w, head+line)
			head = strings.Repeat(" ", len(head))
		}
	}
	return w.Flush()
}

// fold breaks a text between words into lines of so many bytes at most, where words are not longer.
func fold(text string, width int) []string {
	var out []string
	line := ""
	for word := range strings.FieldsSeq(text) {
		if line != "" && len(line)+1+len(word) > width {
			out, line = append(out, line), ""
		}
		line = strings.TrimPrefix(line+" "+word, " ")
	}
	return append(out, line)
}
