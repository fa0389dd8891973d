package declared

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/spec"
	"viaduct/internal/journal"
)

// A declaration that is applied with --confirm is written down before the first write, and stays so until it is confirmed: also
// after it was rolled back, or the power cut. A boot that finds the same declaration uses the one that was confirmed last.

const unconfirmedKey = "unconfirmed"

// unconfirmed is a declaration that nobody has confirmed.
type unconfirmed struct {
	Spec  string    `json:"spec"` // as YAML
	Until time.Time `json:"until"`
	Boot  string    `json:"boot"` // what was applied in another boot is gone
	Over  bool      `json:"over"` // rolled back
}

// confirmedFile has the declaration that was confirmed last.
func (m *Manager) confirmedFile() string { return filepath.Join(m.State.Dir(), "confirmed.yaml") }

func (m *Manager) bootID() string {
	id, _ := m.Host.String("proc/sys/kernel/random/boot_id")
	return id
}

func text(s *spec.Host) (string, error) {
	b, err := s.YAML(nil)
	return string(b), err
}

// Begin writes down a declaration that is to be confirmed within a time.
func (m *Manager) Begin(s *spec.Host, within time.Duration) error {
	y, err := text(s)
	if err != nil {
		return err
	}
	return m.State.Put(unconfirmedKey, unconfirmed{Spec: y, Until: time.Now().Add(within), Boot: m.bootID()})
}

// Keep makes a declaration the confirmed one.
func (m *Manager) Keep(s *spec.Host) error {
	y, err := text(s)
	if err != nil {
		return err
	}
	return m.keep(y)
}

func (m *Manager) keep(y string) error {
	old, err := os.ReadFile(m.confirmedFile())
	if err != nil || string(old) != y {
		if err := journal.WriteFile(m.confirmedFile(), []byte(y)); err != nil {
			return err
		}
	}
	return m.State.Delete(unconfirmedKey)
}

// Confirm makes what waits for it the confirmed declaration.
func (m *Manager) Confirm() error {
	var u unconfirmed
	known, err := m.State.Get(unconfirmedKey, &u)
	switch {
	case err != nil:
		return err
	case !known:
		return errors.New("nothing waits to be confirmed")
	case u.Over || u.Boot != m.bootID() || time.Now().After(u.Until):
		return fmt.Errorf("the time to confirm ended at %s: it is rolled back, or was with the last boot", u.Until.Format(time.TimeOnly))
	}
	return m.keep(u.Spec)
}

// Booted is the declaration that a boot, or the watch service, is to use: the confirmed one, if the time to confirm the one at hand
// is over.
func (m *Manager) Booted(s *spec.Host) (use *spec.Host, instead bool, err error) {
	var u unconfirmed
	if known, err := m.State.Get(unconfirmedKey, &u); err != nil || !known {
		return s, false, err
	}
	y, err := text(s)
	if err != nil || y != u.Spec || u.Boot == m.bootID() && !u.Over && time.Now().Before(u.Until) {
		return s, false, err
	}
	content, err := os.ReadFile(m.confirmedFile())
	if errors.Is(err, os.ErrNotExist) {
		return &spec.Host{}, true, nil
	}
	if err != nil {
		return nil, false, err
	}
	use, err = spec.Parse(m.confirmedFile(), content)
	return use, true, err
}

// AwaitConfirmed waits until what is unconfirmed now is confirmed, or another apply has taken its place, and reports whether
// neither has come by its time.
func (m *Manager) AwaitConfirmed() (late bool, err error) {
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return false, os.NewSyscallError("inotify_init1", err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, m.State.Dir(), unix.IN_MOVED_TO|unix.IN_DELETE); err != nil {
		return false, os.NewSyscallError("inotify_add_watch", err)
	}
	var first, now unconfirmed
	if known, err := m.State.Get(unconfirmedKey, &first); err != nil || !known {
		return false, err
	}
	for {
		now = unconfirmed{}
		known, err := m.State.Get(unconfirmedKey, &now)
		if err != nil || !known || now.Over || !now.Until.Equal(first.Until) {
			return false, err
		}
		left := time.Until(first.Until)
		if left <= 0 {
			return true, nil
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(watch), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		var events [4096]byte
		_, _ = unix.Read(watch, events[:])
	}
}

// RolledBack writes down that the time to confirm is over.
func (m *Manager) RolledBack() error {
	var u unconfirmed
	if known, err := m.State.Get(unconfirmedKey, &u); err != nil || !known {
		return err
	}
	u.Over = true
	return m.State.Put(unconfirmedKey, u)
}
