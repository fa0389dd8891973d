package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/migrate"
	"viaduct/internal/filelock"
	"viaduct/internal/shell"
	"viaduct/iommu"
	"viaduct/sriov"
)

// side is this host as a side of a move; the caller closes the host.
func (e *env) side(h *iommu.Host, timeout time.Duration) *migrate.Side {
	priority, known := unix.Getpriority(unix.PRIO_PROCESS, 0)
	return &migrate.Side{
		Host: h,
		Leases: func(ctx context.Context) (context.Context, func(), *lease.Manager, error) {
			ctx, stop, m, err := e.beginLeases(ctx, timeout, lease.Makes)
			if err != nil {
				return nil, nil, nil, err
			}
			return ctx, func() {
				stop()
				if known == nil {
					// What is started afterwards has what viaduct was started with.
					setNice(h, 20-priority)
				}
			}, m, nil
		},
		Look: func() (func(), *lease.Manager, error) {
			m, stop, err := e.lookWithLeases()
			return stop, m, err
		},
		Read: e.facts,
		Note: e.note,
	}
}

// runMigrate checks whether a guest is ready, and moves it.
func runMigrate(ctx context.Context, e *env, o *migrateOptions) error {
	if err := e.mayChange(); err != nil && !o.check {
		return err
	}
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	if !h.Live() {
		return usagef("migrate: %s is a captured host: --to must be a snapshot or folder too (%s)", e.hostName, o.to)
	}
	side := e.side(h, o.timeout)
	way, err := migrate.ParseTransport(o.to, o.version, e.stderr)
	if err != nil {
		return usageError{err}
	}
	if !o.check && !e.dryRun {
		held, err := lease.BookOf(h).LockMove(ctx, o.guest, o.timeout)
		if err != nil {
			return err
		}
		defer held.Close()
		if r, err := side.Record(o.guest); err != nil || r != nil && (r.Source || r.Phase != migrate.Arrived) {
			return errors.Join(err, fmt.Errorf("another move of %s is not over: viaduct migrate %s --resume, or "+
				"--cancel",
				o.guest, shell.Quote(o.guest)))
		}
	}

	report, g, err := e.readiness(ctx, o, way)
	if err != nil {
		return err
	}
	if o.check {
		return e.tellReport(report)
	}
	if !report.Ready {
		return e.tellReport(report)
	}
	for _, l := range report.Lines {
		if l.Result == migrate.Warn {
			e.note("%s: %s", l.Check, l.What)
		}
	}
	r, err := e.newRecord(ctx, h, o, report, g)
	if err != nil {
		return err
	}
	if e.dryRun {
		p := &preview{what: "step"}
		p.of(fmt.Sprintf("%s moves to %s, by %s", r.Guest, r.Peer, r.Order.Way))
		p.says(migrate.Words(r)...)
		p.does(migrate.Plan(r)...)
		e.preview(p)
		return nil
	}
	var probe *migrate.Probe
	if o.probe != "" {
		netdev, err := probeOver(h, r, g)
		if err != nil {
			return err
		}
		mac, _ := net.ParseMAC(r.Order.Address) // none: all are asked
		if probe, err = migrate.NewProbe(netdev, mac, o.probed); err != nil {
			return err
		}
	}
	if err := side.Home().Save(ctx, r); err != nil {
		return err
	}
	return e.drive(ctx, o, side, way, r, migrate.Forward, probe)
}

// readiness asks both hosts, and the guest's QEMU, and checks.
func (e *env) readiness(ctx context.Context, o *migrateOptions,
	way *migrate.Transport) (*migrate.Report, *migrate.Guest, error) {
	g, here, err := e.guestFacts(o.guest)
	if err != nil {
		return nil, nil, err
	}
	if g.VM.Libvirt() {
		g.State, err = migrate.AskDomain(ctx, g)
	} else {
		g.State, err = migrate.AskGuest(ctx, g.VM)
	}
	if err != nil {
		return nil, nil, err
	}
	name := o.to
	if strings.HasPrefix(name, "exec:") {
		name = "the other host"
	}
	there, err := migrate.AskHost(ctx, way, g, name)
	if err != nil {
		return nil, nil, err
	}
	return migrate.Check(g, here, there, o.wish), g, nil
}

// newRecord is the record of a move that is to begin.
func (e *env) newRecord(ctx context.Context, h *iommu.Host, o *migrateOptions, report *migrate.Report,
	g *migrate.Guest) (*migrate.Record, error) {
	book := lease.BookOf(h)
	l, err := book.Get(o.guest)
	if err != nil {
		return nil, err
	}
	if l == nil || l.VM == nil || l.VM.Socket == "" && !l.VM.Libvirt() {
		return nil, fmt.Errorf("%s: its QEMU has no socket of viaduct's (assign or run it with --failover or "+
			"--movable)", o.guest)
	}

	words, err := book.Words(o.guest)
	if err != nil {
		return nil, err
	}

	settings := sriov.Settings{}
	for k, v := range l.Devices[0].Wanted {
		if k != sriov.MAC {
			settings[k] = v
		}
	}

	address := l.Devices[0].Now[sriov.MAC]
	if address == noAddress {
		address = ""
	}

	pool := o.wish.Pool
	if pool == "" {
		pool = g.From
	}

	r := &migrate.Record{
		ID: migrate.NewID(), Guest: o.guest, Phase: migrate.Checked, Source: true, Peer: o.to, Began: time.Now(),
		Socket: l.VM.Socket,
		Order: migrate.Order{Way: report.By, From: pool, Count: len(l.Devices), Settings: settings, Address: address,
			VM: *l.VM, Words: words},
	}

	if l.VM.Libvirt() {
		r.URI, err = o.libvirtURI()
		return r, err
	}

	if r.Started, err = migrate.ProcessOf(ctx, h, r.Socket); err != nil {
		return nil, err
	}

	return r, nil
}

// libvirtURI is how libvirt here reaches libvirt on the other host (docs/uri.rst of libvirt).
func (o *migrateOptions) libvirtURI() (string, error) {
	switch {
	case o.limits.Downtime != 0:
		return "", usagef("migrate: --downtime is not for guests of libvirt's, which chooses it itself")
	case o.uri != "":
		return o.uri, nil
	case strings.HasPrefix(o.to, "exec:"):
		return "", usagef("migrate: by which way does libvirt here reach libvirt there? (--libvirt URI)")
	}
	return "qemu+ssh://" + o.to + "/system", nil
}

// probeOver is the network interface over which a guest is reached from here, wherever it is: that of its bridge, or of
// its PF.
func probeOver(h *iommu.Host, r *migrate.Record, g *migrate.Guest) (string, error) {
	if r.Order.VM.Standby != "" {
		return r.Order.VM.Standby, nil
	}
	netdevs, err := h.Names(path.Join("sys/bus/pci/devices", g.Devices[0].PF, "net"))
	if err != nil || len(netdevs) == 0 {
		return "", errors.Join(fmt.Errorf("migrate: --probe %s: the guest's PF has no network interface", r.Guest), err)
	}
	return netdevs[0], nil
}

const noAddress = "00:00:00:00:00:00"

// drive drives a move until it is over, or cannot go on; a probe, if any, ends with it.
func (e *env) drive(ctx context.Context, o *migrateOptions, side *migrate.Side, way *migrate.Transport,
	r *migrate.Record, want migrate.Wants, probe *migrate.Probe) error {
	ctx, stop := untilSignal(ctx)
	defer stop()
	d := &migrate.Driver{
		Home: side.Home(), Remote: way, Record: r, Limits: o.limits,
		Tell: func(a migrate.Action) error {
			if a != migrate.Done && !e.json {
				e.note("%s", a)
			}
			return nil
		},
	}

	if _, err := unix.IoctlGetTermios(2, unix.TCGETS); err == nil && !e.json {
		d.Progress = func(done, total uint64) { e.note("%d of %d MiB", done>>20, total>>20) }
	}

	err := d.Run(ctx, want)
	if probe != nil {
		probed := probe.End()
		d.Outcome.Probed = &probed
	}

	if d.Outcome.Moved || err == nil {
		e.tellOutcome(r, &d.Outcome)
		return err
	}

	switch left, unread := side.Record(r.Guest); {
	case unread != nil:
	case left == nil:
		e.note("%s is here, as it was", r.Guest)
	default:
		e.note("the move of %s is not over: viaduct migrate %s --resume, or --cancel", r.Guest, shell.Quote(r.Guest))
	}

	return err
}

// outcomeView is what a move took, in JSON. What is not known is null.
type outcomeView struct {
	Guest    string     `json:"guest"`
	Moved    bool       `json:"moved"`
	To       string     `json:"to"`
	Downtime *int       `json:"qemu_downtime_ms"`  // as the source's QEMU tells it
	Stopped  *float64   `json:"stop_to_resume_ms"` // by both clocks
	Error    *float64   `json:"clock_error_ms"`    // by which that may be wrong
	Without  *float64   `json:"without_device_ms"` // from when the VF had left the guest until it had one again
	Sent     uint64     `json:"memory_bytes"`
	Device   uint64     `json:"device_bytes"` // of that, the state of devices
	Probe    *probeView `json:"probe"`
}

// probeView is what --probe has heard.
type probeView struct {
	migrate.Probed

	Silence float64 `json:"longest_silence_ms"`
}

func (e *env) tellOutcome(r *migrate.Record, o *migrate.Outcome) {
	v := outcomeView{Guest: r.Guest, Moved: o.Moved, To: r.Peer, Downtime: o.Downtime, Sent: o.Memory, Device: o.Device}
	if p := o.Probed; p != nil {
		v.Probe = &probeView{*p, float64(p.Silence.Microseconds()) / 1000}
	}

	between := func(here, there time.Time) *float64 {
		if here.IsZero() || there.IsZero() || !o.Clock.Known {
			return nil
		}
		ms := float64(there.Add(-o.Clock.Ahead).Sub(here).Microseconds()) / 1000
		return &ms
	}

	v.Stopped, v.Without = between(o.Stopped, o.Resumed), between(o.Unplug, o.Plugged)
	if o.Clock.Known {
		ms := float64(o.Clock.Error.Microseconds()) / 1000
		v.Error = &ms
	}

	if e.json {
		e.printJSON(v)
		return
	}

	if !o.Moved {
		fmt.Fprintf(e.stdout, "%s is here, as it was\n", r.Guest)
		return
	}

	fmt.Fprintf(e.stdout, "%s is on %s\n", r.Guest, r.Peer)
	if v.Downtime != nil {
		fmt.Fprintf(e.stdout, "QEMU's downtime %d ms\n", *v.Downtime)
	}
	if v.Stopped != nil {
		fmt.Fprintf(e.stdout, "stopped until it went on %.1f ms (the clocks are known to %.1f ms)\n", *v.Stopped,
			*v.Error)
	}

	if v.Without != nil {
		what := "without its VF"
		if r.Order.VM.Standby != "" {
			what = "on its virtio NIC"
		}
		fmt.Fprintf(e.stdout, "%s %.1f ms\n", what, *v.Without)
	}

	if p := v.Probe; p != nil {
		fmt.Fprintf(e.stdout, "%d of %d questions to %s were lost, and the longest silence was %.1f ms\n",
			max(p.Sent-p.Answered, 0), p.Sent, p.Address, p.Silence)
	}
}

// runMigrateMend goes on with an interrupted move, or takes it back.
func runMigrateMend(ctx context.Context, e *env, o *migrateOptions) error {
	if err := e.mayChange(); err != nil {
		return err
	}
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	side := e.side(h, o.timeout)
	held, err := lease.BookOf(h).LockMove(ctx, o.guest, o.timeout)
	if err != nil {
		return err
	}
	defer held.Close()
	r, err := side.Record(o.guest)
	if err != nil {
		return err
	}
	if r == nil {
		return side.Unmark(ctx, o.guest)
	}

	s := &migrate.Server{House: side.House(), Version: o.version}
	switch {
	case !r.Source && o.resume:
		return s.Finish(ctx, r)
	case !r.Source:
		if err := s.LetGo(ctx, r); err != nil {
			return err
		}
		fmt.Fprintf(e.stdout, "%s is not expected here any more\n", r.Guest)
		return nil
	}
	to := r.Peer
	if o.to != "" {
		to = o.to
	}
	way, err := migrate.ParseTransport(to, o.version, e.stderr)
	if err != nil {
		return usageError{err}
	}
	want := migrate.Forward
	switch {
	case o.cancel:
		want = migrate.Back
	case o.takeBack:
		want = migrate.TakeBack
	}
	return e.drive(ctx, o, side, way, r, want, nil)
}

// runMigratePeer is the other side of a move: it answers what is asked on standard input.
func runMigratePeer(ctx context.Context, e *env, o *migrateOptions) error {
	if err := notTyped("migrate --peer"); err != nil {
		return err
	}
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	side := e.side(h, o.timeout)
	side.Command = o.command
	if o.data == "" {
		o.data = dataAsked(os.Getenv("SSH_ORIGINAL_COMMAND"))
	}
	if o.data != "" {
		return e.takeData(ctx, side, o.data)
	}
	if err := e.mayChange(); err != nil {
		return err
	}
	s := &migrate.Server{House: side.House(), Version: o.version}
	var held *filelock.File
	s.Lock = func(ctx context.Context, guest string) (err error) {
		held, err = lease.BookOf(h).LockMove(ctx, guest, o.timeout)
		return err
	}
	err = s.Serve(ctx, os.Stdin, os.Stdout)
	if held != nil {
		held.Close()
	}
	return err
}

// dataAsked is the move whose memory comes, by what the other side wanted to run where sshd runs this command whatever
// that is (sshd(8), command= in authorized_keys); "" if it is none.
func dataAsked(original string) string {
	words := strings.Fields(original)
	if i := slices.Index(words, "--data"); i >= 0 && i+1 < len(words) {
		return words[i+1]
	}
	return ""
}

// takeData carries a guest's memory from standard input to the QEMU that waits for it, and what that answers back.
func (e *env) takeData(ctx context.Context, side *migrate.Side, id string) error {
	socket, err := side.DataSocket(id)
	if err != nil {
		return err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	migrate.Carry(conn, standard{})
	return nil
}

// standard is this process's standard input and output.
type standard struct{}

func (standard) Read(b []byte) (int, error)  { return os.Stdin.Read(b) }
func (standard) Write(b []byte) (int, error) { return os.Stdout.Write(b) }
func (standard) Close() error                { return errors.Join(os.Stdin.Close(), os.Stdout.Close()) }
