package declared

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/filelock"
	"viaduct/internal/host"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Which declaration is in force is written down in one record, which is changed under one lock; and everybody asks one
// function for it. A declaration that is applied with --confirm is a trial: it is written down before the first write,
// and stays so until it is confirmed, also after it was rolled back, or the power cut.

const inForceKey = "in-force"

// inForce is that record.
type inForce struct {
	// Confirmed was applied to its end, or confirmed, last: what is fallen back to. nil if nothing ever was.
	Confirmed *hostfile.Host `json:"confirmed,omitempty"`
	Trial     *trial         `json:"trial,omitempty"`
	// Held is the boot in which the host is not as declared on purpose: it was undone, or another file was applied.
	Held *string `json:"held,omitempty"`
}

// trial is a declaration that nobody has confirmed.
type trial struct {
	Declared *hostfile.Host `json:"declared"`
	Other    bool           `json:"other,omitempty"` // it is of another file than a boot reads
	Token    string         `json:"token"`           // which tells it from the next one
	Until    time.Duration  `json:"until"`           // since the boot, as the clock of the day may be set meanwhile
	Boot     string         `json:"boot"`            // what was applied in another boot is gone
	Force    []holder.Kind  `json:"force,omitempty"` // what was overridden for it, and is for its rollback
	Over     bool           `json:"over,omitempty"`  // rolled back
}

// Use is a declaration that is in force.
type Use struct {
	Host *hostfile.Host
	Why  string // it is not that of the host's files; "" if it is
	Held bool   // the host is not as declared on purpose, and is left alone until the next apply
}

// moment is when something is asked, or happens.
type moment struct {
	boot string        // the id of the boot
	now  time.Duration // since the boot, sleep included
}

// waiting reports whether a trial was applied in this boot, and not rolled back.
func (t *trial) waiting(at moment) bool { return t != nil && !t.Over && t.Boot == at.boot }

// late reports whether it waits, and its time is over.
func (t *trial) late(at moment) bool { return t.waiting(at) && t.Until <= at.now }

// use is [Manager.InForce].
func (r *inForce) use(file *hostfile.Host, unreadable error, at moment) (*Use, error) {
	u := &Use{Host: file, Held: r.held(at)}
	switch t := r.Trial; {
	case t.waiting(at) && !t.late(at) && !t.Other:
		if same, err := equal(file, t.Declared); err != nil || same && unreadable == nil {
			return u, err
		}
		u.Host, u.Why = t.Declared, "an apply waits for its confirmation, and is in force until then"
	case t != nil && !t.Other:
		u.Host = r.Confirmed
		u.Why = "an apply of host.yaml was not confirmed: until the next apply, the last confirmed configuration " +
			"is used " +
			"instead of it"
		if u.Host == nil {
			u.Host = &hostfile.Host{}
		}
	case unreadable != nil && r.Confirmed == nil:
		return nil, unreadable
	case unreadable != nil:
		u.Host, u.Why = r.Confirmed, "the declared configuration cannot be read: the last confirmed one is used"
	}
	return u, nil
}

func (r *inForce) held(at moment) bool { return r.Held != nil && *r.Held == at.boot }

func (r *inForce) hold(on bool, at moment) {
	if r.Held = nil; on {
		r.Held = &at.boot
	}
}

func (r *inForce) starts(other bool, at moment) {
	r.Trial = nil
	r.hold(other, at)
}

func (r *inForce) ended(s *hostfile.Host) {
	if r.Trial == nil {
		r.Confirmed = s
	}
}

func (r *inForce) tries(t trial, within time.Duration, at moment) {
	t.Boot, t.Until = at.boot, at.now+within
	r.Trial = &t
	r.hold(t.Other, at)
}

func (r *inForce) extend(token string, within time.Duration, at moment) (waits bool) {
	if waits = r.Trial.waiting(at) && r.Trial.Token == token; waits {
		r.Trial.Until = at.now + within
	}
	return waits
}

func (r *inForce) confirm(at moment) (booted bool, err error) {
	t := r.Trial
	switch {
	case t == nil:
		return false, errors.New("there is no apply to confirm")
	case !t.waiting(at) || t.late(at):
		return false, errors.New("the time to confirm is over: viaduct undoes the apply, or a boot ended it")
	}
	if !t.Other {
		r.Confirmed = t.Declared
	}
	r.Trial = nil
	return !t.Other, nil
}

func (r *inForce) rolledBack(token string) {
	if r.Trial != nil && r.Trial.Token == token {
		r.Trial.Over, r.Held = true, nil
	}
}

func (r *inForce) undone(at moment) {
	if r.Trial != nil {
		r.Trial.Over = true
	}
	r.hold(true, at)
}

// InForce is what a boot, the watch service and status go by: what the host's files declare, unless an apply of them
// waits to be confirmed or was not confirmed, or they cannot be read, which is the error that is given. It is that
// error where nothing else ever was in force.
func (m *Manager) InForce(file *hostfile.Host, unreadable error) (*Use, error) {
	r, at, err := m.now()
	if err != nil {
		return nil, err
	}
	return r.use(file, unreadable, at)
}

// Starts says that an apply begins which is not to be confirmed: what it applies is in force from now on, whatever
// becomes of it. Another file than the host's own holds the host as it is until the next apply.
func (m *Manager) Starts(other bool) error {
	return m.change(func(r *inForce, at moment) error {
		r.starts(other, at)
		return nil
	})
}

// Ended says that an apply of the host's own files, which was not to be confirmed, did all that they declare.
func (m *Manager) Ended(s *hostfile.Host) error {
	return m.change(func(r *inForce, _ moment) error {
		r.ended(s)
		return nil
	})
}

// Tries says that an apply begins that is to be confirmed within a time; the token names it. Withdraw ends the trial,
// and brings back what was in force before, as long as nothing was changed.
func (m *Manager) Tries(s *hostfile.Host, within time.Duration, other bool) (token string, withdraw func() error,
	err error) {
	token = rand.Text()
	var was inForce
	err = m.change(func(r *inForce, at moment) error {
		was = *r
		r.tries(trial{Declared: s, Other: other, Token: token, Force: m.options.Force}, within, at)
		return nil
	})
	withdraw = func() error {
		return m.change(func(r *inForce, _ moment) error {
			if r.Trial != nil && r.Trial.Token == token {
				*r = was
			}
			return nil
		})
	}
	return token, withdraw, err
}

// Extend counts the time to confirm from now, and reports whether the trial still waits: it may have been confirmed, or
// its time have come, while the apply was at work.
func (m *Manager) Extend(token string, within time.Duration) (waits bool, err error) {
	err = m.change(func(r *inForce, at moment) error {
		waits = r.extend(token, within, at)
		return nil
	})
	return waits, err
}

// Confirm makes the trial the confirmed declaration, which a boot uses too, unless it was of another file than the
// host's own.
func (m *Manager) Confirm() (booted bool, err error) {
	err = m.change(func(r *inForce, at moment) (err error) {
		booted, err = r.confirm(at)
		return err
	})
	return booted, err
}

// Due reports whether a trial waits to be confirmed, and its time is over.
func (m *Manager) Due(token string) (bool, error) {
	r, at, err := m.now()
	return err == nil && r.Trial.late(at) && r.Trial.Token == token, err
}

// RolledBack says that a trial is over. The watch service has what was confirmed, then.
func (m *Manager) RolledBack(token string) error {
	return m.change(func(r *inForce, _ moment) error {
		r.rolledBack(token)
		return nil
	})
}

// Undone says that what was applied was undone on purpose: a trial is over, and the host is left alone.
func (m *Manager) Undone() error {
	return m.change(func(r *inForce, at moment) error {
		r.undone(at)
		return nil
	})
}

// Held reports whether the host is not as declared on purpose.
func (m *Manager) Held() (bool, error) {
	r, at, err := m.now()
	return err == nil && r.held(at), err
}

// AwaitConfirmed waits until the trial is confirmed, and reports whether that has not come by its time, which trial it
// is, and what was overridden for it. Another apply with --confirm sets the time anew.
func (m *Manager) AwaitConfirmed() (late bool, token string, force []holder.Kind, err error) {
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil {
		defer unix.Close(watch)
		_, err = unix.InotifyAddWatch(watch, m.state.Dir(), unix.IN_MOVED_TO|unix.IN_DELETE)
	}

	most := time.Hour
	if err != nil {
		// A host may have no more of them: then it looks each second.
		watch, most = -1, time.Second
	}
	for {
		r, at, err := m.now()
		if err != nil || !r.Trial.waiting(at) {
			return false, "", nil, err
		}
		if r.Trial.late(at) {
			return true, r.Trial.Token, r.Trial.Force, nil
		}
		left := r.Trial.Until - at.now
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(watch), Events: unix.POLLIN}}, int(min(left, most).Milliseconds())+1)
		var events [4096]byte
		if watch >= 0 {
			_, _ = unix.Read(watch, events[:])
		}
	}
}

// waits reports whether something that was applied in this boot waits to be confirmed.
func (m *Manager) waits() (bool, error) {
	r, at, err := m.now()
	return err == nil && r.Trial.waiting(at), err
}

// equal reports whether two hosts declare the same, wherever that was written.
func equal(a, b *hostfile.Host) (bool, error) {
	if a == nil || b == nil {
		return a == b, nil
	}
	one, err1 := a.YAML(nil)
	two, err2 := b.YAML(nil)
	return string(one) == string(two), errors.Join(err1, err2)
}

// now is the record, and the moment that it is read at.
func (m *Manager) now() (*inForce, moment, error) {
	id, since, err := m.host.Boot()
	at := moment{id, since}
	if err != nil {
		return nil, at, err
	}
	var r inForce
	known, err := m.state.Get(inForceKey, &r)
	if err == nil && !known {
		former, err := m.formerInForce(at)
		return former, at, err
	}
	if err == nil && r.Trial != nil && r.Trial.Declared == nil {
		err = fmt.Errorf("%s/%s.json: what waits to be confirmed is missing", m.state.Dir(), inForceKey)
	}
	return &r, at, err
}

// change changes the record as of now, when nobody else does, unless that is an error.
func (m *Manager) change(how func(*inForce, moment) error) error {
	locks, err := filelock.Open(m.run.Dir() + "/lock-in-force")
	if err != nil {
		return err
	}
	defer locks.Close()
	ctx, cancel := context.WithTimeout(context.Background(), bind.DefaultTimeout)
	defer cancel()
	if err := locks.Wait(ctx, 0); err != nil {
		return fmt.Errorf("lock the record of the configuration in force: %w", err)
	}

	r, at, err := m.now()
	if err != nil {
		return err
	}
	if err := how(r, at); err != nil {
		return err
	}
	if err := m.state.Put(inForceKey, r); err != nil {
		return err
	}
	return m.forgetFormer()
}

// What follows is for records of viaduct before the first that had this one.

const (
	formerTrial     = "unconfirmed"
	formerHold      = "hold"
	formerConfirmed = StateDir + "/confirmed.yaml"
)

// formerInForce makes the record of those that were there before: one of what is unconfirmed, a file of what was
// confirmed, and, in /run, that the host is left alone.
func (m *Manager) formerInForce(at moment) (*inForce, error) {
	r := &inForce{}
	content, err := m.host.Read(formerConfirmed)
	if err == nil {
		r.Confirmed, err = hostfile.Parse(m.host.Path(formerConfirmed), content)
	}
	if err != nil && !host.Absent(err) {
		return nil, err
	}

	var old struct {
		Spec  string        `json:"spec"` // as YAML
		Until time.Duration `json:"until"`
		Boot  string        `json:"boot"`
		Force []holder.Kind `json:"force"`
		Over  bool          `json:"over"`
		Other bool          `json:"other"`
	}
	known, err := m.state.Get(formerTrial, &old)
	if err != nil {
		return nil, err
	}
	if known {
		s, err := hostfile.Parse("what waits to be confirmed", []byte(old.Spec))
		if err != nil {
			return nil, err
		}
		r.Trial = &trial{Declared: s, Other: old.Other, Token: "", Until: old.Until, Boot: old.Boot, Force: old.Force,
			Over: old.Over}
	}
	var held bool
	if known, err = m.run.Get(formerHold, &held); known && held {
		r.hold(true, at)
	}
	return r, err
}

// forgetFormer removes those, once they are in the record.
func (m *Manager) forgetFormer() error {
	return errors.Join(m.state.Delete(formerTrial), m.host.Remove(formerConfirmed), m.run.Delete(formerHold))
}
