package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/qmp"
	"viaduct/cmd/internal/vmm"
)

// runner is what runs a guest on one side: its QEMU, by the machine protocol, or libvirt. It is nil of one that has
// ended.
type runner interface {
	// look asks what it does with the guest, in QEMU's words, and how far a copy is.
	look() (status string, p progress, err error)
	// has reports whether there is a device that it and the guest have taken.
	has(device string) (bool, error)
	// unplug asks the guest to let go of a device, and waits until it has.
	unplug(ctx context.Context, device string, wait time.Duration) (time.Time, error)
	// plug plugs a device, and sees that it is there.
	plug(ctx context.Context, device string, args map[string]any) error
	// announce has the guest's address announced to the network, over its virtio NIC.
	announce() error
	// load begins to wait for a guest's memory at a socket.
	load(socket string) error
	// settled waits until a copy has come to an end, and tells how far it is meanwhile.
	settled(ctx context.Context, tell func(progress)) (progress, error)
	cancel() error
	// stopped is when it last stopped the guest; zero if it did not tell.
	stopped() time.Time
	// goOn lets the guest run, and sees that it does.
	goOn(ctx context.Context) (time.Time, error)
	// quit ends the guest, and waits until it has gone.
	quit(ctx context.Context) error
	Ended() error
	Close() error
}

// machine is a guest's QEMU.
type machine struct{ *qmp.Client }

// dialMost is how long a QEMU may take to greet; one that serves another client never does.
const dialMost = 10 * time.Second

// dial connects to the QEMU of a socket; nil if there is none.
func dial(ctx context.Context, socket string) (*machine, error) {
	ctx, cancel := context.WithTimeout(ctx, dialMost)
	defer cancel()
	c, err := qmp.Dial(ctx, socket)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	m := &machine{c}
	// The source hears whether the destination could load; both tell of each step.
	if err := m.able("return-path", "events"); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return m, nil
}

// able turns capabilities of migration on.
func (m *machine) able(names ...string) error {
	type capability struct {
		Name string `json:"capability"`
		On   bool   `json:"state"`
	}
	var all []capability
	for _, n := range names {
		all = append(all, capability{n, true})
	}
	return m.do("migrate-set-capabilities", map[string]any{"capabilities": all}, nil)
}

// switchoverAck has the source wait until the destination's devices have what they need before the guest is stopped
// (QEMU 8.1).
const switchoverAck = "switchover-ack"

// most is how long a command may take.
const most = 20 * time.Second

// do is Do for commands that QEMU answers at once.
func (m *machine) do(command string, args, out any) error {
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	return m.Do(ctx, command, args, out)
}

// progress is what query-migrate tells (qapi/migration.json).
type progress struct {
	Status   string `json:"status"`
	Why      string `json:"error-desc"`
	Downtime *int   `json:"downtime"` // in ms
	Total    *int   `json:"total-time"`
	RAM      struct {
		Transferred uint64 `json:"transferred"`
		Remaining   uint64 `json:"remaining"`
		Total       uint64 `json:"total"`
	} `json:"ram"`
	VFIO *struct {
		Transferred uint64 `json:"transferred"`
	} `json:"vfio"`
	Blocked []string `json:"blocked-reasons"`
}

// look asks what a QEMU does.
func (m *machine) look() (status string, p progress, err error) {
	var s struct{ Status string }
	err1 := m.do("query-status", nil, &s)
	err2 := m.do("query-migrate", nil, &p)
	return s.Status, p, errors.Join(err1, err2)
}

// runsAs is a status of QEMU's (RunState in qapi/run-state.json) as a Runs.
func runsAs(status string) Runs {
	switch status {
	case "running":
		return Running
	case "inmigrate":
		return Awaits
	case "shutdown", "internal-error", "guest-panicked", "io-error":
		// It does not run, and nothing but an end comes of it.
		return Paused
	}
	return Paused
}

// copied is a status of query-migrate's (MigrationStatus) as a Copy.
func copied(status string) Copy {
	switch status {
	case "", "none":
		return NoCopy
	case "completed":
		return Completed
	case "failed", "cancelled":
		return Failed
	}
	return Underway
}

// child is a device of QEMU's, by its name.
type child struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// has reports whether QEMU has a device of this name, which it and the guest have taken.
func (m *machine) has(device string) (bool, error) {
	var all []child
	if err := m.do("qom-list", map[string]string{"path": "/machine/peripheral"}, &all); err != nil {
		return false, err
	}
	return slices.ContainsFunc(all, func(c child) bool { return c.Name == device }), nil
}

// deviceOf reads the device that an event is about.
func deviceOf(e qmp.Event) string {
	var d struct{ Device string }
	_ = json.Unmarshal(e.Data, &d)
	return d.Device
}

// unplug asks the guest to let go of a device, and waits until it has. One that was asked already is waited for.
func (m *machine) unplug(ctx context.Context, device string, wait time.Duration) (time.Time, error) {
	mark := m.Mark()
	err := m.do("device_del", map[string]string{"id": device}, nil)
	refused, _ := errors.AsType[*qmp.Error](err)
	if err != nil && refused == nil {
		return time.Time{}, err
	}
	if refused != nil && refused.Class == "DeviceNotFound" {
		return time.Now(), nil
	}
	// Of one that was asked before QEMU says that it is at it.
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("the guest has not let go of it within %s", wait))
	defer cancel()
	e, err := m.Await(ctx, mark, func(e qmp.Event) bool {
		return (e.Name == "DEVICE_DELETED" || e.Name == "DEVICE_UNPLUG_GUEST_ERROR") && deviceOf(e) == device
	})
	if there, err2 := m.has(device); err != nil && err2 == nil && !there {
		return time.Now(), nil
	}
	switch {
	case err != nil && refused != nil:
		return time.Time{}, errors.Join(err, refused)
	case err != nil:
		return time.Time{}, err
	case e.Name != "DEVICE_DELETED":
		return time.Time{}, errors.New("the guest refuses to let go of it")
	}
	return e.Time, nil
}

// plugMost is how long a guest may take until a device that was plugged shows.
const plugMost = 30 * time.Second

// plug plugs a device, and sees that it is there: QEMU's own answer may say so of one that is hidden for good.
func (m *machine) plug(ctx context.Context, device string, args map[string]any) error {
	there, err := m.has(device)
	if err != nil || there {
		return err
	}
	if err := m.do("device_add", args, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, plugMost)
	defer cancel()
	for {
		if there, err = m.has(device); err != nil || there {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("QEMU took %s and does not show it", device)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// announce has the guest's address announced to the network, over its virtio NIC if it is there.
func (m *machine) announce() error {
	there, err := m.has(vmm.StandbyID)
	if err != nil || !there {
		return err
	}
	return m.do("announce-self", map[string]any{
		"initial": 50, "max": 550, "rounds": 5, "step": 100, "interfaces": []string{vmm.StandbyID},
	}, nil)
}

// send begins to send the guest's memory to who listens at a socket.
func (m *machine) send(socket string, limits map[string]any) error {
	if len(limits) > 0 {
		if err := m.do("migrate-set-parameters", limits, nil); err != nil {
			return err
		}
	}
	return m.do("migrate", map[string]string{"uri": "unix:" + socket}, nil)
}

// load begins to wait for a guest's memory at a socket. QEMU does not end when what comes cannot be loaded; older ones
// (before 9.1) always do.
func (m *machine) load(socket string) error {
	err := m.do("migrate-incoming", map[string]any{"uri": "unix:" + socket, "exit-on-error": false}, nil)
	if refused, _ := errors.AsType[*qmp.Error](err); refused != nil && refused.Class == "GenericError" {
		return m.do("migrate-incoming", map[string]any{"uri": "unix:" + socket}, nil)
	}
	return err
}

func (m *machine) cancel() error { return m.do("migrate_cancel", nil, nil) }

func (m *machine) stopped() (at time.Time) {
	for _, e := range m.Since(0) {
		if e.Name == "STOP" {
			at = e.Time
		}
	}
	return at
}

// settled waits until a copy has come to an end, and tells how far it is meanwhile.
func (m *machine) settled(ctx context.Context, tell func(progress)) (progress, error) {
	for {
		mark := m.Mark()
		_, p, err := m.look()
		if err != nil || copied(p.Status) != Underway {
			return p, err
		}
		if tell != nil {
			tell(p)
		}
		second, cancel := context.WithTimeout(ctx, time.Second)
		_, err = m.Await(second, mark, func(e qmp.Event) bool { return e.Name == "MIGRATION" })
		cancel()
		switch {
		case ctx.Err() != nil:
			return p, context.Cause(ctx)
		case errors.Is(err, qmp.ErrClosed):
			return p, err
		}
	}
}

// goOn lets the guest run, and sees that it does.
func (m *machine) goOn(ctx context.Context) (time.Time, error) {
	mark := m.Mark()
	status, _, err := m.look()
	if err != nil || status == "running" {
		return time.Now(), err
	}
	if err := m.do("cont", nil, nil); err != nil {
		return time.Time{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	e, err := m.Await(ctx, mark, func(e qmp.Event) bool { return e.Name == "RESUME" })
	return e.Time, err
}

// quit ends QEMU, and waits until it has gone.
func (m *machine) quit(ctx context.Context) error {
	err := m.do("quit", nil, nil)
	if err != nil && !errors.Is(err, qmp.ErrClosed) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	if _, err := m.Await(ctx, m.Mark(), func(qmp.Event) bool { return false }); !errors.Is(err, qmp.ErrClosed) {
		return err
	}
	return nil
}

// reach is dial for a QEMU that may be at its end: while its process lives and nobody answers, it is waited for.
func reach(ctx context.Context, socket string, alive func() bool) (*machine, error) {
	for end := time.Now().Add(dialMost); ; {
		m, err := dial(ctx, socket)
		if m != nil {
			return m, nil
		}
		if !alive() {
			// Whatever was wrong with its socket.
			return nil, nil
		}
		if time.Now().After(end) {
			return nil, errors.Join(fmt.Errorf("the guest's QEMU lives, and does not answer at %s", socket), err)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
