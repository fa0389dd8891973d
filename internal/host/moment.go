package host

import (
	"encoding/json"
	"time"

	"golang.org/x/sys/unix"
)

// MomentFile is where a snapshot has when it was taken.
const MomentFile = "viaduct/moment.json"

// Moment is a point in time of a host.
type Moment struct {
	Time  time.Time     `json:"time"`       // by the clock of the day
	Boot  string        `json:"boot"`       // the kernel's name of the boot; "" if it tells none
	Since time.Duration `json:"since_boot"` // by the boot's own clock, sleep included, which nobody can set
}

// Now is this moment, and of a captured host that in which it was captured: false if that is not known.
func (h *Host) Now() (Moment, bool) {
	if !h.Live() {
		b, err := h.Read(MomentFile)
		if err != nil {
			return Moment{}, false
		}
		return decodeMoment(b)
	}
	m := Moment{Time: time.Now()}
	var err error
	m.Boot, m.Since, err = h.Boot()
	return m, err == nil
}

// decodeMoment reads the moment of a snapshot, which is not believed what no clock shows.
func decodeMoment(b []byte) (Moment, bool) {
	var m Moment
	if err := json.Unmarshal(b, &m); err != nil || m.Time.IsZero() || m.Since < 0 {
		return Moment{}, false
	}
	return m, true
}

// Boot is the kernel's name of this boot, "" if it tells none, and the time since it began, sleep included, which no
// change of the clock of the day moves. That of a captured host is of when it was captured.
func (h *Host) Boot() (id string, since time.Duration, err error) {
	if !h.Live() {
		m, _ := h.Now()
		return m.Boot, m.Since, nil
	}
	if id, err = h.String("proc/sys/kernel/random/boot_id"); Absent(err) {
		err = nil
	}
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return id, time.Duration(t.Nano()), err
}
