package declared

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host"
	"viaduct/vfio/holder"
)

// A declaration that is applied with --confirm is written down before the first write, and stays so until it is
// confirmed: also after it was rolled back, or the power cut. A boot that finds the same declaration uses the one that
// was confirmed last.

const unconfirmedKey = "unconfirmed"

// unconfirmed is a declaration that nobody has confirmed.
type unconfirmed struct {
	Spec  string        `json:"spec"`  // as YAML
	Until time.Duration `json:"until"` // since the boot, as the clock of the day may be set meanwhile
	Boot  string        `json:"boot"`  // what was applied in another boot is gone
	Force []holder.Kind `json:"force"` // what was overridden for it, and is for its rollback
	Over  bool          `json:"over"`  // rolled back
	Other bool          `json:"other"` // of another file than a boot reads
}

// sinceBoot is the time since the boot, sleep included.
func sinceBoot() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return time.Duration(t.Nano())
}

// waits reports whether something that was applied in this boot waits to be confirmed.
func (m *Manager) waits() (bool, error) {
	var u unconfirmed
	known, err := m.state.Get(unconfirmedKey, &u)
	return known && m.open(&u), err
}

// confirmedFile has the declaration that was confirmed last.
const confirmedFile = StateDir + "/confirmed.yaml"

func (m *Manager) bootID() string {
	id, _ := m.host.String("proc/sys/kernel/random/boot_id")
	return id
}

func text(s *hostfile.Host) (string, error) {
	b, err := s.YAML(nil)
	return string(b), err
}

// Begin writes down a declaration, that of host.yaml or another, that is to be confirmed within a time.
func (m *Manager) Begin(s *hostfile.Host, within time.Duration, other bool) error {
	y, err := text(s)
	if err != nil {
		return err
	}
	return m.state.Put(unconfirmedKey,
		unconfirmed{Spec: y, Until: sinceBoot() + within, Boot: m.bootID(), Force: m.options.Force, Other: other})
}

// Keep makes a declaration the confirmed one.
func (m *Manager) Keep(s *hostfile.Host) error {
	y, err := text(s)
	if err != nil {
		return err
	}
	return m.keep(y)
}

func (m *Manager) keep(y string) error {
	old, err := m.host.Read(confirmedFile)
	if err != nil || string(old) != y {
		if err := m.host.Replace(confirmedFile, []byte(y)); err != nil {
			return err
		}
	}
	return m.state.Delete(unconfirmedKey)
}

// Confirm makes what waits for it the confirmed declaration, which a boot uses too, unless it was another than that of
// host.yaml.
func (m *Manager) Confirm() (booted bool, err error) {
	var u unconfirmed
	known, err := m.state.Get(unconfirmedKey, &u)
	switch {
	case err != nil:
		return false, err
	case !known:
		return false, errors.New("nothing waits to be confirmed")
	case !m.open(&u) || u.left() <= 0:
		return false, errors.New("the time to confirm is over: it is rolled back, or was with the last boot")
	case u.Other:
		return false, m.state.Delete(unconfirmedKey)
	}
	return true, m.keep(u.Spec)
}

// open reports whether a declaration was applied in this boot, and not rolled back.
func (m *Manager) open(u *unconfirmed) bool { return !u.Over && u.Boot == m.bootID() }

func (u *unconfirmed) left() time.Duration { return u.Until - sinceBoot() }

// Due reports whether something waits to be confirmed, and its time is over.
func (m *Manager) Due() (bool, error) {
	var u unconfirmed
	known, err := m.state.Get(unconfirmedKey, &u)
	return known && m.open(&u) && u.left() <= 0, err
}

// Booted is the declaration that a boot, or the watch service, is to use: that of host.yaml, unless an apply of it was
// to be confirmed and was not. Then it is the one that was confirmed last, whatever host.yaml has become since, until
// the next apply; and while the time to confirm goes on, it is what was applied.
func (m *Manager) Booted(s *hostfile.Host) (*hostfile.Host, error) {
	var u unconfirmed
	if known, err := m.state.Get(unconfirmedKey, &u); err != nil || !known {
		return s, err
	}
	switch {
	case u.Other:
		return s, nil
	case m.open(&u) && u.left() > 0:
		if y, err := text(s); err != nil || y == u.Spec {
			return s, err
		}
		return hostfile.Parse("what waits to be confirmed", []byte(u.Spec))
	}
	return m.Confirmed()
}

// Confirmed is the declaration that was confirmed last; nothing if none was.
func (m *Manager) Confirmed() (*hostfile.Host, error) {
	content, err := m.host.Read(confirmedFile)
	if host.Absent(err) {
		return &hostfile.Host{}, nil
	}
	if err != nil {
		return nil, err
	}
	return hostfile.Parse(m.host.Path(confirmedFile), content)
}

// AwaitConfirmed waits until what is unconfirmed is confirmed, and reports whether that has not come by its time, and
// what was overridden for it. Another apply with --confirm sets the time anew.
func (m *Manager) AwaitConfirmed() (late bool, force []holder.Kind, err error) {
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
		var u unconfirmed
		known, err := m.state.Get(unconfirmedKey, &u)
		if err != nil || !known || !m.open(&u) {
			return false, nil, err
		}
		left := u.left()
		if left <= 0 {
			return true, u.Force, nil
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(watch), Events: unix.POLLIN}}, int(min(left, most).Milliseconds())+1)
		var events [4096]byte
		if watch >= 0 {
			_, _ = unix.Read(watch, events[:])
		}
	}
}

// RolledBack writes down that the time to confirm is over.
func (m *Manager) RolledBack() error {
	var u unconfirmed
	if known, err := m.state.Get(unconfirmedKey, &u); err != nil || !known {
		return err
	}
	u.Over = true
	return m.state.Put(unconfirmedKey, u)
}
