package declared

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"testing"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/vfio/holder"
)

// version is a declaration that is told by its number of VFs.
func version(n int) *hostfile.Host { return &hostfile.Host{PFs: []hostfile.PF{{Count: n}}} }

func versionOf(s *hostfile.Host) int {
	if s == nil || len(s.PFs) == 0 {
		return 0
	}
	return s.PFs[0].Count
}

// What can happen to a declared host. An apply ends in "ended" if it did all, and a trial's in "extend".
var events = []string{"edit", "apply", "ended", "try", "extend", "other", "confirm", "late", "guard", "undo", "boot"}

const confirmTime = time.Minute

// machine is the record under test, with the clock and the file beside it.
type machine struct {
	r     inForce
	at    moment
	file  int
	token int
}

func (x *machine) happens(event string) {
	switch event {
	case "edit":
		x.file++
	case "apply":
		x.r.starts(false, x.at)
	case "ended":
		x.r.ended(version(x.file))
	case "try":
		x.token++
		x.r.tries(trial{Declared: version(x.file), Token: strconv.Itoa(x.token)}, confirmTime, x.at)
	case "extend":
		x.r.extend(strconv.Itoa(x.token), confirmTime, x.at)
	case "other":
		x.r.starts(true, x.at)
	case "confirm":
		_, _ = x.r.confirm(x.at)
	case "late":
		x.at.now += 2 * confirmTime
	case "guard":
		if x.r.Trial.late(x.at) {
			x.r.rolledBack(x.r.Trial.Token)
		}
	case "undo":
		x.r.undone(x.at)
	case "boot":
		x.at = moment{x.at.boot + "'", 0}
	}
}

// model says by what has happened, and not by what was written down, which version is in force, and whether the host is
// left alone.
func model(past []string) (inForce int, held bool) {
	file, tried, confirmed := 1, 0, 0 // tried is the version that waits, or waited in vain; 0: none
	waits, overdue := false, false
	for _, event := range past {
		switch event {
		case "edit":
			file++
		case "apply", "other":
			tried, waits, held = 0, false, event == "other"
		case "ended":
			if tried == 0 {
				confirmed = file
			}
		case "try":
			tried, waits, overdue, held = file, true, false, false
		case "extend":
			overdue = overdue && !waits
		case "confirm":
			if waits && !overdue {
				tried, waits, confirmed = 0, false, tried
			}
		case "late":
			overdue = true
		case "guard":
			if waits && overdue {
				waits, held = false, false
			}
		case "undo":
			waits, held = false, true
		case "boot":
			waits, held = false, false
		}
	}

	switch {
	case tried == 0:
		return file, held
	case waits && !overdue:
		return tried, held
	}
	return confirmed, held
}

// Every order of up to five events leads to the declaration in force that what has happened says.
func TestInForce(t *testing.T) {
	walked, wrong := 0, 0
	var walk func(x machine, past []string)
	walk = func(x machine, past []string) {
		walked++
		use, err := x.r.use(version(x.file), nil, x.at)
		want, held := model(past)
		if got := versionOf(use.Host); err != nil || got != want || use.Held != held || use.Why == "" && got != x.file {
			if wrong++; wrong < 10 {
				t.Errorf("after %q: version %d, left alone %v, %q, %v; want version %d, %v", past, got, use.Held,
					use.Why, err,
					want, held)
			}
		}
		if len(past) == 5 {
			return
		}
		for _, event := range events {
			next := x
			if x.r.Trial != nil {
				next.r.Trial = new(*x.r.Trial)
			}
			next.happens(event)
			walk(next, append(slices.Clip(past), event))
		}
	}
	walk(machine{at: moment{"boot", 0}, file: 1}, nil)
	if walked < 150_000 {
		t.Errorf("%d orders were tried", walked)
	}
}

// Files that cannot be read leave in force what was confirmed last, and nothing where nothing ever was.
func TestInForceUnreadable(t *testing.T) {
	broken := errors.New("host.yaml:1: broken")
	at := moment{"boot", time.Hour}
	if use, err := (&inForce{}).use(nil, broken, at); !errors.Is(err, broken) {
		t.Errorf("where nothing ever was: %+v, %v", use, err)
	}
	r := inForce{Confirmed: version(3)}
	if use, err := r.use(nil, broken, at); err != nil || versionOf(use.Host) != 3 || use.Why == "" {
		t.Errorf("%+v, %v", use, err)
	}
	r.tries(trial{Declared: version(4), Token: "x"}, time.Minute, at)
	if use, err := r.use(nil, broken, at); err != nil || versionOf(use.Host) != 4 || use.Why == "" {
		t.Errorf("while an apply waits to be confirmed: %+v, %v", use, err)
	}
}

// What is written down comes back, for another run of the program; a trial that could not begin leaves no trace.
func TestInForceRecord(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	m := newManager(t, k, Options{Force: []holder.Kind{holder.Route}})
	if _, err := m.Confirm(); err == nil {
		t.Error("nothing was there to confirm")
	}
	inUse := func(file int) (int, bool) {
		t.Helper()
		use, err := Of(m.host).InForce(version(file), nil)
		if err != nil {
			t.Fatal(err)
		}
		return versionOf(use.Host), use.Held
	}

	if err := errors.Join(m.Starts(false), m.Ended(version(1))); err != nil {
		t.Fatal(err)
	}
	_, withdraw, err := m.Tries(version(2), time.Minute, false)
	if err := errors.Join(err, withdraw()); err != nil {
		t.Fatal(err)
	}
	if n, held := inUse(5); n != 5 || held {
		t.Errorf("a trial that was withdrawn: version %d, %v", n, held)
	}

	token, _, err := m.Tries(version(2), time.Millisecond, false)
	if err != nil {
		t.Fatal(err)
	}
	late, whose, force, err := m.AwaitConfirmed()
	if !late || whose != token || len(force) != 1 || err != nil {
		t.Errorf("nobody confirmed it: %v, %q, %v, %v", late, whose, force, err)
	}
	if due, err := m.Due(token); !due || err != nil {
		t.Errorf("due: %v, %v", due, err)
	}
	if waits, err := m.Extend(token, time.Hour); !waits || err != nil {
		t.Errorf("extended: %v, %v", waits, err)
	}
	if due, err := m.Due(token); due || err != nil {
		t.Errorf("extended, and still due: %v, %v", due, err)
	}
	if n, _ := inUse(5); n != 2 {
		t.Errorf("while it waits: version %d", n)
	}
	if booted, err := m.Confirm(); !booted || err != nil {
		t.Errorf("confirmed: %v, %v", booted, err)
	}
	// The apply that was confirmed while it worked comes to its end.
	if waits, err := m.Extend(token, time.Hour); waits || err != nil {
		t.Errorf("confirmed, and waits again: %v, %v", waits, err)
	}
	if late, _, _, err := m.AwaitConfirmed(); late || err != nil {
		t.Errorf("there is no apply to confirm: %v, %v", late, err)
	}

	if token, _, err = m.Tries(version(3), time.Minute, true); err != nil {
		t.Fatal(err)
	}
	if n, held := inUse(5); n != 5 || !held {
		t.Errorf("while another file waits: version %d, %v", n, held)
	}
	if booted, err := m.Confirm(); booted || err != nil {
		t.Errorf("another file is confirmed for boots: %v, %v", booted, err)
	}
	if err := errors.Join(m.RolledBack(token), m.Undone()); err != nil {
		t.Fatal(err)
	}
	if held, err := Of(m.host).Held(); !held || err != nil {
		t.Errorf("undone: %v, %v", held, err)
	}
}

// Records that viaduct wrote before are read as long as nothing changes, and are one record then.
func TestInForceFormer(t *testing.T) {
	const yaml = "pfs:\n  - select: mac=52:54:00:00:01:01\n    count: %d\n"
	waiting := func(boot string, over bool) string {
		b, _ := json.Marshal(map[string]any{
			"spec": fmt.Sprintf(yaml, 2), "until": 1 << 62, "boot": boot, "force": []string{"route"}, "over": over,
			"other": false,
		})
		return string(b)
	}
	for name, c := range map[string]struct {
		trial string
		held  bool
		want  int
	}{
		"nothing waits":        {"", false, 5},
		"left alone":           {"", true, 5},
		"it waits":             {waiting("this", false), false, 2},
		"it was rolled back":   {waiting("this", true), false, 1},
		"of the boot before":   {waiting("that", false), false, 1},
		"and it is left alone": {waiting("this", true), true, 1},
	} {
		k := hosttest.NewLab(t, hosttest.Tree{"proc/sys/kernel/random/boot_id": "this\n"})
		write := func(file, content string) {
			full := filepath.Join(k.Dir(), file)
			if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755),
				os.WriteFile(full, []byte(content), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		write(formerConfirmed, fmt.Sprintf(yaml, 1))
		if c.trial != "" {
			write(StateDir+"/unconfirmed.json", c.trial)
		}
		if c.held {
			write(journal.Dir+"/hold.json", "true")
		}

		m := newManager(t, k, Options{})
		for range 2 {
			use, err := m.InForce(version(5), nil)
			if err != nil || versionOf(use.Host) != c.want || use.Held != c.held {
				t.Errorf("%s: %+v, %v, want version %d", name, use, err, c.want)
			}
			if err := m.change(func(*inForce, moment) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		for _, file := range []string{formerConfirmed, StateDir + "/unconfirmed.json", journal.Dir + "/hold.json"} {
			if m.host.Exists(file) {
				t.Errorf("%s: %s is left", name, file)
			}
		}
		r, _, err := m.now()
		if err != nil || versionOf(r.Confirmed) != 1 || c.trial != "" &&
			!reflect.DeepEqual(r.Trial.Force, []holder.Kind{holder.Route}) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}
