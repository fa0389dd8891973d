package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/migrate"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// migrateOptions are what migrate is asked for.
type migrateOptions struct {
	guest, to, by, bandwidth string
	uri                      string // of libvirt on the other host
	probe                    string
	probed                   netip.Addr // probe, as an address
	wish                     migrate.Wish
	check, cancel, resume    bool
	takeBack, peer           bool
	force, data              string
	limits                   migrate.Limits
	timeout                  time.Duration
	command                  []string // of --peer: what starts QEMU, whatever the other side says
	version                  string
}

func migrateCommand(e *env) *cli.Command {
	var o migrateOptions
	return command(&cli.Command{
		Name:      "migrate",
		Usage:     "move a running guest with its devices to another host",
		ArgsUsage: "GUEST --to HOST",
		Description: "Check whether the guest is ready, reserve a VF on HOST, take the guest's own VF from it, send " +
			"its memory over, and give it the VF there. viaduct runs `ssh HOST viaduct migrate --peer`, or the " +
			"command of --to exec:COMMAND. With a failover pair (run --failover BRIDGE) the guest keeps its " +
			"connections; with --movable it has no NIC meanwhile. A failure before the guest belongs to the other " +
			"host takes it back to where it was. --resume finishes an interrupted move, and --cancel takes it back, " +
			"on either host.\n\nWith --check, only report whether the guest is ready: HOST may then be a snapshot, " +
			"and --host another one. Exit status: 0 if nothing refuses, 3 if something does.\n\n" +
			"Examples:\n  viaduct migrate web --to host2 --check\n  viaduct migrate web --to host2 --from net\n  " +
			"viaduct migrate web --resume\n  viaduct --host a.snapshot migrate web --to b.snapshot --check",
		Flags: append([]cli.Flag{
			&cli.StringFlag{
				Name:        "to",
				Usage:       "the other `HOST`, as ssh knows it, or exec:COMMAND; with --check also a snapshot",
				Destination: &o.to,
			},
			&cli.BoolFlag{Name: "check", Usage: "only report whether the guest is ready", Destination: &o.check},
			&cli.StringFlag{
				Name:        "from",
				Usage:       "draw from this `POOL` of the other host (default: the name of the one here)",
				Destination: &o.wish.Pool,
			},
			&cli.StringFlag{
				Name:        "by",
				Usage:       "move the device by `failover|vfio|replug` (default: the first that can be)",
				Destination: &o.by,
			},
			&cli.StringFlag{
				Name:        "libvirt",
				Usage:       "the `URI` of the other host's libvirt (default: qemu+ssh://HOST/system)",
				Destination: &o.uri,
			},
			&cli.StringFlag{
				Name: "probe",
				Usage: "meanwhile ask the guest by ARP whether it hears, at this IPv4 `ADDRESS` of it, and " +
					"count what is lost",
				Destination: &o.probe,
			},
			&cli.DurationFlag{
				Name:        "downtime",
				Usage:       "let QEMU stop the guest for this long (default: QEMU's own)",
				Destination: &o.limits.Downtime,
			},
			&cli.StringFlag{
				Name:        "bandwidth",
				Usage:       "send at most this `SIZE` of memory a second (e.g. 100M)",
				Destination: &o.bandwidth,
			},
			&cli.DurationFlag{
				Name:        "unplug-wait",
				Usage:       "give the guest this long to let go of its device",
				Value:       30 * time.Second,
				Destination: &o.limits.Unplug,
			},
			&cli.DurationFlag{
				Name:        "copy-timeout",
				Usage:       "give sending its memory this long; 0 means without limit",
				Value:       10 * time.Minute,
				Destination: &o.limits.Whole,
			},
			&cli.BoolFlag{Name: "cancel", Usage: "take an interrupted move back", Destination: &o.cancel},
			&cli.BoolFlag{Name: "resume", Usage: "finish an interrupted move", Destination: &o.resume},
			&cli.BoolFlag{
				Name:        "take-back",
				Usage:       "take a move back that the other host cannot finish",
				Destination: &o.takeBack,
			},
			&cli.StringFlag{
				Name:        "force",
				Usage:       "with --take-back, `split-brain`: your word that the other host does not run the guest",
				Destination: &o.force,
			},
			&cli.BoolFlag{
				Name:        "peer",
				Usage:       "serve the other side of a move on standard input and output",
				Destination: &o.peer,
			},
			&cli.StringFlag{Name: "data", Usage: "with --peer, take the memory of the move `ID`", Destination: &o.data},
			&cli.DurationFlag{
				Name:        "timeout",
				Usage:       "wait this long for one write, and for another viaduct",
				Value:       bind.DefaultTimeout,
				Destination: &o.timeout,
			},
			e.jsonFlag(),
		}, e.dryRunFlags()...),
		BashComplete: e.completeGuests,
		Action: func(c *cli.Context) (err error) {
			o.version = buildVersion().String()
			if o.peer {
				o.command = c.Args().Slice()
				return runMigratePeer(c.Context, e, &o)
			}
			if o.guest, err = oneArgument(c, "the guest's name"); err != nil {
				return err
			}
			if err := o.parse(); err != nil {
				return err
			}
			switch {
			case o.cancel || o.resume || o.takeBack:
				return runMigrateMend(c.Context, e, &o)
			case o.check && isSnapshot(o.to):
				return runMigrateSnapshots(e, &o)
			}
			return runMigrate(c.Context, e, &o)
		},
	})
}

// parse reads what the flags say.
func (o *migrateOptions) parse() error {
	if err := lease.CheckGuest(o.guest); err != nil {
		return usageError{err}
	}

	switch o.wish.By = migrate.Way(o.by); o.wish.By {
	case "", migrate.ByFailover, migrate.ByReplug, migrate.ByVFIO:
	default:
		return usagef("migrate: --by %q: want failover, vfio or replug", o.by)
	}

	mends := 0
	for _, set := range []bool{o.cancel, o.resume, o.takeBack} {
		if set {
			mends++
		}
	}

	switch {
	case mends > 1:
		return usagef("migrate: --cancel, --resume or --take-back: one of them")
	case mends == 0 && o.to == "":
		return usagef("migrate: to which host? (--to)")
	case mends == 1 && o.check:
		return usagef("migrate: --check is of a move that has not begun")
	case o.takeBack && o.force != "split-brain":
		return usagef("migrate: --take-back runs the guest here although it may run there: if you know that the " +
			"other host is off, say so (--take-back --force=split-brain)")
	case o.force != "" && !o.takeBack:
		return usagef("migrate: --force is for --take-back")
	}

	var err error
	if o.probe != "" {
		if o.probed, err = netip.ParseAddr(o.probe); err != nil || !o.probed.Is4() {
			return usagef("migrate: --probe %s: want an IPv4 address of the guest", o.probe)
		}
	}

	if o.limits.Bandwidth, err = parseSize(o.bandwidth); err != nil {
		return usagef("migrate: --bandwidth %q: want a size, e.g. 100M", o.bandwidth)
	}

	return checkTimeout(o.timeout)
}

// isSnapshot reports whether a name is that of a captured host's file or folder.
func isSnapshot(name string) bool {
	_, err := os.Stat(name)
	return err == nil || strings.ContainsRune(name, '/') && !strings.HasPrefix(name, "exec:")
}

// runMigrateSnapshots reports whether a guest is ready for another host that was captured.
func runMigrateSnapshots(e *env, o *migrateOptions) error {
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
		e.printJSON(r)
	} else {
		e.printText(func(w *bufio.Writer) { writeReport(w, r) })
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
func writeReport(w io.Writer, r *migrate.Report) {
	fmt.Fprintf(w, "%s from %s to %s, by %s\n", r.Guest, r.From, r.To, r.By)
	for _, l := range r.Lines {
		head := fmt.Sprintf("%-8s %-15s ", l.Result, l.Check)
		for _, line := range fold(fmt.Sprintf("%s [%s]", l.What, l.Where), 80-len(head)) {
			fmt.Fprintln(w, head+line)
			head = strings.Repeat(" ", len(head))
		}
	}
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
