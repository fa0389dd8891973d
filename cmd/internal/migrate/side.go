package migrate

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/vmm"
	"viaduct/internal/journal"
	"viaduct/internal/netlink"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// Side is one host of a move: what the move does there beside QEMU. It is the Home of a Driver and the Guesthouse of a
// Server.
type Side struct {
	Host *iommu.Host
	// Leases begins work on leases; stop ends it, and lets go of the locks of devices.
	Leases func(ctx context.Context) (_ context.Context, stop func(), m *lease.Manager, err error)
	// Look is Leases for who changes nothing.
	Look func() (stop func(), m *lease.Manager, err error)
	// Facts are the host's.
	Read func(m *lease.Manager) (*Facts, error)
	// Command is what starts the guest's VMM here, whatever the other side says; nil: the other side's words are taken.
	Command []string
	// Note is told what a user should know.
	Note func(format string, a ...any)
}

// moveKey is the key of what is written down of a guest's move.
func moveKey(guest string) string { return "move-" + url.PathEscape(guest) }

func (s *Side) state() *journal.Journal { return journal.In(s.Host.Host, declared.StateDir) }

// Record is what is written down of a guest's move; nil if nothing is.
func (s *Side) Record(guest string) (*Record, error) {
	var r Record
	known, err := s.state().Get(moveKey(guest), &r)
	if err != nil || !known {
		return nil, err
	}
	return &r, nil
}

// SocketOf is where a guest's QEMU has its machine protocol, for viaduct. A socket's name has no more than 107 bytes.
func SocketOf(h *iommu.Host, guest string) string {
	name := url.PathEscape(guest)
	const longest = 40
	if len(name) > longest {
		f := fnv.New64a()
		f.Write([]byte(guest))
		name = fmt.Sprintf("%.20s-%016x", name, f.Sum64())
	}
	return h.Path(path.Join(journal.Dir, "qmp-"+name))
}

// Socket is SocketOf for a guest that is to come.
func (s *Side) Socket(r *Record) string { return SocketOf(s.Host, r.Guest) }

// Home is the side as a source.
func (s *Side) Home() Home { return sourceSide{s} }

// House is the side as a destination.
func (s *Side) House() Guesthouse { return destinationSide{s} }

type sourceSide struct{ *Side }

func (s sourceSide) Save(ctx context.Context, r *Record) error {
	if err := s.state().Put(moveKey(r.Guest), r); err != nil {
		return err
	}
	return s.setMoving(ctx, r.Guest, lease.Leaving)
}

func (s sourceSide) Drop(ctx context.Context, r *Record, stays bool) error {
	if stays {
		if err := s.setMoving(ctx, r.Guest, ""); err != nil {
			return err
		}
	}
	return s.state().Delete(moveKey(r.Guest))
}

// setMoving says in the lease what its guest does. A lease that has ended has nothing to say.
func (s *Side) setMoving(ctx context.Context, guest string, moving lease.State) error {
	l, err := lease.BookOf(s.Host).Get(guest)
	if err != nil || l == nil || l.Moving == moving {
		return err
	}
	ctx, stop, m, err := s.Leases(ctx)
	if err != nil {
		return err
	}
	defer stop()
	return m.SetMoving(ctx, guest, moving)
}

// Unmark takes from a lease the mark of a move of which nothing is written down: it was interrupted at its very end.
func (s *Side) Unmark(ctx context.Context, guest string) error {
	l, err := lease.BookOf(s.Host).Get(guest)
	if err != nil {
		return err
	}
	if l == nil || l.Moving == "" {
		return fmt.Errorf("%s does not move", guest)
	}
	return s.setMoving(ctx, guest, "")
}

// DataSocket is where the memory of a move is to be sent here, by its id.
func (s *Side) DataSocket(id string) (string, error) {
	keys, err := s.state().Keys(moveKey(""))
	if err != nil {
		return "", err
	}
	for _, k := range keys {
		var r Record
		if known, err := s.state().Get(k, &r); err != nil || !known {
			continue
		}
		if socket, err := DataSocket(&r, id); err == nil {
			return socket, nil
		}
	}
	return DataSocket(nil, id)
}

// Address is the MAC address that a guest's device has.
func (s *Side) Address(guest string) (string, error) {
	stop, m, err := s.Look()
	if err != nil {
		return "", err
	}
	defer stop()
	return m.Address(guest)
}

// SetAddress gives a guest's device its address, or one that is no guest's.
func (s *Side) SetAddress(ctx context.Context, guest, mac string) error {
	ctx, stop, m, err := s.Leases(ctx)
	if err != nil {
		return err
	}
	defer stop()
	if err := m.SetAddress(ctx, guest, mac); err != nil {
		return err
	}
	now, err := m.Address(guest)
	if err != nil {
		return err
	}
	if mac != "" && !strings.EqualFold(now, mac) {
		return fmt.Errorf("the device of %s has %s instead of %s", guest, now, mac)
	}
	return nil
}

// Device are QEMU's words for a guest's device, as device_add takes them, or, as "xml", libvirt's.
func (s *Side) Device(r *Record) (map[string]any, error) {
	l, err := lease.BookOf(s.Host).Get(r.Guest)
	if err != nil {
		return nil, err
	}
	if l == nil || len(l.Devices) == 0 {
		return nil, &lease.NoLeaseError{Guest: r.Guest}
	}
	format, known := vmm.Find(r.Order.VM.Format)
	if !known {
		format, _ = vmm.Find("qemu")
	}
	if !r.Order.libvirt() {
		return format.Plugged(l.Devices[0].Address, r.Order.VM.Standby != ""), nil
	}
	d := l.Devices[0]
	vlan := d.Wanted[sriov.VLAN]
	if vlan == "0" {
		vlan = ""
	}
	text := vmm.PluggedLibvirt(&vmm.Guest{Name: r.Guest, Standby: r.Order.VM.Standby, Devices: []vmm.Device{{
		Address: d.Address, VF: d.PF != nil, NIC: true, MAC: r.Order.Address, VLAN: vlan,
		QoS: d.Wanted[sriov.QoS], Proto: d.Wanted[sriov.Proto],
	}}})
	return map[string]any{"host": d.Address.String(), "xml": text}, nil
}

// Release gets a guest's device back clean, and ends its lease.
func (s *Side) Release(ctx context.Context, guest string) error {
	l, err := lease.BookOf(s.Host).Get(guest)
	if err != nil || l == nil {
		return err
	}
	ctx, stop, m, err := s.Leases(ctx)
	if err != nil {
		return err
	}
	defer stop()
	certificates, err := m.EndMoved(ctx, guest, time.Minute)
	for _, c := range certificates {
		if c.Result != lease.Clean {
			s.Note("%s of %s: %s: %s", c.Address, guest, c.Result, c.Why)
		}
	}
	if err != nil && len(certificates) > 0 {
		// It is in quarantine, and the lease has ended.
		s.Note("%v", err)
		return nil
	}
	return err
}

// Alive reports whether the process that has a guest lives.
func (s *Side) Alive(r *Record) bool {
	if r.Started.PID != 0 {
		return r.Started.Alive(s.Host)
	}
	l, err := lease.BookOf(s.Host).Get(r.Guest)
	if err != nil || l == nil {
		return false
	}
	if l.Runner != nil && l.Runner.Alive(s.Host) {
		return true
	}
	for _, h := range l.Holders {
		if h.Alive(s.Host) {
			return true
		}
	}
	return false
}

// Forget has bridges forget over which of their ports, other than one that leads to a NIC's PF, they have learned an
// address: it is reached over the VF again.
func (s *Side) Forget(mac string) error {
	c, err := netlink.Dial(s.Host.Host, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	all, err := c.Neighbors()
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range all {
		if n.Bridge == 0 || n.Own || !strings.EqualFold(n.Address.String(), mac) || s.leadsOut(c, n.Index) {
			continue
		}
		if err := c.Forget(n); err != nil && !netlink.Gone(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// leadsOut reports whether a port of a bridge is no guest's: guests' are taps.
func (s *Side) leadsOut(c *netlink.Conn, index int) bool {
	l, err := c.LinkByIndex(index)
	return err != nil || !s.Host.Exists(path.Join(netClass, l.Name, "tun_flags"))
}

type destinationSide struct{ *Side }

func (d destinationSide) Facts(ctx context.Context, w *FactsWish) (*FactsAnswer, error) {
	stop, m, err := d.Look()
	if err != nil {
		return nil, err
	}
	defer stop()
	f, err := d.Read(m)
	if err != nil {
		return nil, err
	}

	if f.Heard, err = d.heard(); err != nil {
		// It is not known.
		f.Heard = nil
	}

	if w.VM.Libvirt() {
		if f.Libvirt, err = libvirtVersion(ctx); err != nil {
			d.Note("libvirt: %v", err)
		}
	}

	if w.Program != "" {
		if f.QEMU, err = TryQEMU(ctx, d.Host, w.Program, &w.VM); err != nil {
			d.Note("QEMU could not be tried: %v", err)
		}
	}

	disks := map[string]bool{}
	for _, p := range w.Disks {
		_, err := os.Stat(p)
		disks[p] = err == nil
	}

	return &FactsAnswer{Facts: f, Disks: disks}, nil
}

// heard is over which interfaces bridges have learned addresses, but for those of guests here.
func (s *Side) heard() (map[string]string, error) {
	c, err := netlink.Dial(s.Host.Host, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	all, err := c.Neighbors()
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, n := range all {
		if n.Bridge == 0 || n.Own || !s.leadsOut(c, n.Index) {
			continue
		}
		if l, err := c.LinkByIndex(n.Index); err == nil {
			out[n.Address.String()] = l.Name
		}
	}
	return out, nil
}

func (d destinationSide) Save(r *Record) error { return d.state().Put(moveKey(r.Guest), r) }

func (d destinationSide) Drop(guest string) error { return d.state().Delete(moveKey(guest)) }

func (d destinationSide) Reserve(ctx context.Context, r *Record) error {
	ctx, stop, m, err := d.Leases(ctx)
	if err != nil {
		return err
	}
	defer stop()
	vm := r.Order.VM
	vm.Socket = d.Socket(r)
	settings := hostfile.Plain(r.Order.Settings)
	if r.Order.Way == ByVFIO && r.Order.Address != "" {
		// It is the host's, and no part of the device's state; the VF takes no frames before the guest goes on.
		settings[sriov.MAC] = hostfile.Value(r.Order.Address)
	}
	if r.Order.libvirt() {
		vm.Socket = ""
	}
	request := &lease.Request{
		Guest: r.Guest, Memory: vm.Memory, VM: &vm, Persist: r.Order.libvirt(),
		Sources: []lease.Source{{From: r.Order.From, Count: r.Order.Count, Settings: settings}},
	}
	_, notes, err := m.Expect(ctx, request)
	for _, n := range notes {
		d.Note("%s", n)
	}
	return err
}

func (d destinationSide) Leased(guest string) (bool, error) {
	l, err := lease.BookOf(d.Host).Get(guest)
	return l != nil && l.Ready, err
}

// Stay makes the lease of a guest that has arrived one as any other, and keeps the words that started it.
func (d destinationSide) Stay(ctx context.Context, r *Record) error {
	if r.Order.Address != "" {
		if err := d.Forget(r.Order.Address); err != nil {
			d.Note("bridges may send what is for %s to its virtio NIC for a while: %v", r.Guest, err)
		}
	}
	if len(r.Order.Words) > 0 {
		if err := lease.BookOf(d.Host).KeepWords(r.Guest, r.Order.Words); err != nil {
			return err
		}
	}
	return d.setMoving(ctx, r.Guest, "")
}

// guest is a guest that is to come, as its VMM is told of it.
func (d destinationSide) guest(r *Record) (*vmm.Guest, *vmm.Format, error) {
	stop, m, err := d.Look()
	if err != nil {
		return nil, nil, err
	}
	defer stop()
	l, err := m.Book.Get(r.Guest)
	if err != nil {
		return nil, nil, err
	}
	if l == nil {
		return nil, nil, &lease.NoLeaseError{Guest: r.Guest}
	}

	format, known := vmm.Find(r.Order.VM.Format)
	if !known || format.Args == nil || !format.Standby {
		return nil, nil, fmt.Errorf("guests of format %q cannot be started to wait for one that comes",
			r.Order.VM.Format)
	}

	g := &vmm.Guest{Name: r.Guest, Standby: r.Order.VM.Standby, Movable: true, Absent: r.Order.Way != ByVFIO,
		Migrates: r.Order.Way == ByVFIO, Socket: r.Socket}
	for _, dev := range l.Devices {
		found, err := m.Topology.Find(dev.Address)
		if err != nil {
			return nil, nil, err
		}
		v := vmm.Device{Address: dev.Address, VF: dev.PF != nil, MAC: r.Order.Address, VLAN: dev.Now[sriov.VLAN]}
		if found.Group != nil {
			v.Group = *found.Group
		}
		g.Devices = append(g.Devices, v)
	}

	return g, format, nil
}

func (d destinationSide) Start(ctx context.Context, r *Record) error {
	if r.Order.libvirt() {
		// It starts the guest itself, when it comes.
		there, err := (&domain{libvirt: libvirtHere, name: r.Guest}).there(ctx)
		if there {
			err = fmt.Errorf("libvirt has a domain %s here already", r.Guest)
		}
		return err
	}

	g, format, err := d.guest(r)
	if err != nil {
		return err
	}

	words := d.Command
	if len(words) == 0 {
		words = r.Order.Words
	}

	if len(words) == 0 {
		return errors.New("the command that starts the guest's VMM is not known: viaduct run keeps it, or give the " +
			"other side one (viaduct migrate --peer -- COMMAND)")
	}

	program, err := findProgram(words[0], len(d.Command) > 0)
	if err != nil {
		return err
	}

	all := waitingWords(format.Substitute(words[1:], g), &r.Order.VM)
	_ = os.Remove(r.Socket)
	pid, err := startQEMU(ctx, d.Side, r, program, all)
	if err != nil {
		return err
	}

	r.Started = holder.NameProcess(d.Host, pid)
	ctx, stop, m, err := d.Leases(ctx)
	if err != nil {
		return err
	}
	defer stop()
	return m.RunBy(ctx, r.Guest, pid, path.Base(program))
}

// waitingWords are the words of a QEMU that waits for its guest's memory. Where KVM runs the guest its CPU has to be
// what it was, and QEMU is not to leave out what this host does not have.
func waitingWords(words []string, vm *vmm.Machine) []string {
	out := append([]string(nil), words...)
	for i := range out {
		if i > 0 && out[i-1] == "-cpu" && strings.Contains(vm.Accel, "kvm") && !strings.Contains(out[i], "enforce") {
			out[i] += ",enforce"
		}
	}
	return append(out, "-S", "-incoming", "defer")
}

func (d destinationSide) End(ctx context.Context, r *Record) error {
	return endProcess(ctx, d.Host, r.Started)
}
