package migrate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"viaduct/cmd/internal/vmm"
)

// fakeVirsh is virsh of two hosts that are folders: run has what the domain does, kept is there if libvirt keeps it, live
// and next have its device. A file migrate says how the next migration goes.
const fakeVirsh = `#!/bin/sh
cd "$3" && shift 3 || exit 1
fail() { echo "error: $*" >&2; exit 1; }
case "$*" in
"version"*) echo "Running against daemon: 11.3.0" ;;
"list --name") [ ! -e run ] || echo web ;;
"list --persistent --all --name") [ ! -e kept ] || echo web ;;
"domstate web") cat run ;;
"domjobinfo web") echo "Job type: None" ;;
"domjobinfo web --completed --keep-completed") echo "Total downtime: 12           ms" ;;
"dumpxml web"*)
	device=live
	[ "$3" != --inactive ] || device=next
	echo "<domain><name>web</name><devices>$(cat $device 2>/dev/null)</devices></domain>" ;;
"detach-device web "*" --live") [ -e run ] || fail "it does not run"; rm live ;;
"detach-device web "*" --config") rm next ;;
"attach-device web "*" --live") [ -e run ] || fail "it does not run"; cp "$3" live ;;
"attach-device web "*" --config") cp "$3" next ;;
"migrate --live --p2p --tunnelled --persistent --undefinesource web "*)
	to=$8
	[ ! -e live ] && [ ! -e next ] || fail "it has a device of this host"
	how=$(cat migrate 2>/dev/null)
	rm -f migrate
	case $how in
	fails) fail "Unable to read from monitor" ;;
	lost) echo paused >run; echo running >"$to/run"; touch "$to/kept"; fail "End of file while reading data" ;;
	doubt) echo paused >run; fail "End of file while reading data" ;;
	esac
	rm -f run kept
	echo running >"$to/run"
	touch "$to/kept" ;;
"resume web") echo running >run ;;
"destroy web") rm run ;;
*) fail "unknown: $*" ;;
esac
`

// domainPair is two hosts with a libvirt each, as far as it is made up.
type domainPair struct {
	*hostPair

	here, there string
}

func newDomainPair(t *testing.T) *domainPair {
	t.Helper()
	dir := t.TempDir()
	p := &domainPair{&hostPair{t: t, way: ByReplug, dir: dir}, filepath.Join(dir, "here"), filepath.Join(dir, "there")}
	write := func(name, text string, mode os.FileMode) {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("virsh", fakeVirsh, 0o755)
	write("here/run", "running\n", 0o644)
	write("here/kept", "", 0o644)
	write("here/live", deviceText("0000:01:10.0"), 0o644)
	write("here/next", deviceText("0000:01:10.0"), 0o644)
	write("there/none", "", 0o644)
	was := virshProgram
	virshProgram = filepath.Join(dir, "virsh")
	t.Cleanup(func() { virshProgram = was })
	p.from.lease, p.from.address = true, theAddress
	return p
}

func deviceText(host string) string {
	return fmt.Sprintf("<hostdev mode='subsystem' type='pci'><source><address domain='0x0000' bus='0x01' slot='0x10' "+
		"function='0x%s'/></source></hostdev>", host[len(host)-1:])
}

// What the hosts have beside libvirt is as hostPair has it, but that a VMM is not asked whether it has ended.
type domainSource struct {
	source

	pair *domainPair
}

func (domainSource) Device(*Record) (map[string]any, error) {
	return map[string]any{"host": "0000:01:10.0", "xml": deviceText("0000:01:10.0")}, nil
}
func (d domainSource) Release(context.Context, string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pair.does(d.pair.here) != "" {
		return errors.New("the guest has its device open")
	}
	d.from.lease, d.from.address = false, ""
	return nil
}

type domainHouse struct {
	destination

	pair *domainPair
}

func (domainHouse) Device(*Record) (map[string]any, error) {
	return map[string]any{"host": "0000:01:10.2", "xml": deviceText("0000:01:10.2")}, nil
}
func (domainHouse) Start(context.Context, *Record) error { return nil }
func (domainHouse) End(context.Context, *Record) error   { return nil }
func (d domainHouse) Release(context.Context, string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pair.does(d.pair.there) != "" {
		return errors.New("the guest has its device open")
	}
	d.to.lease, d.to.address = false, ""
	return nil
}

// does is what the domain of a host does; "" if there is none.
func (p *domainPair) does(host string) string {
	b, _ := os.ReadFile(filepath.Join(host, "run"))
	return strings.TrimSpace(string(b))
}

func (p *domainPair) has(host, file string) bool {
	_, err := os.Stat(filepath.Join(host, file))
	return err == nil
}

// move drives a move, once.
func (p *domainPair) move(ctx context.Context, record *Record, want Wants, tell func(Action) error,
	work func(Task) error) (*Driver, error) {
	r := newRemote(p.hostPair, work)
	r.house = func() *Server {
		return &Server{House: domainHouse{destination{p.hostPair}, p}, Version: "test", Tell: work,
			libvirt: libvirt(p.there)}
	}
	d := &Driver{Home: domainSource{source{p.hostPair}, p}, Remote: r, Record: record, Tell: tell,
		libvirt: libvirt(p.here),
		Limits:  Limits{Unplug: 5 * time.Second, Whole: time.Minute}}
	err := d.Run(ctx, want)
	r.cut()
	r.serve.Wait()
	return d, err
}

func (p *domainPair) record() *Record {
	r := &Record{ID: NewID(), Guest: "web", Phase: Checked, Source: true, Peer: "the other", URI: p.there,
		Order: Order{Way: ByReplug, From: "net", Count: 1, Address: theAddress, VM: vmm.Machine{Format: "libvirt"}}}
	p.from.save(r)
	return r
}

// ended checks that the domain is on one host alone, with all that it had.
func (p *domainPair) ended(t *testing.T, moved bool) {
	t.Helper()
	at, other, its, others := p.here, p.there, p.from, p.to
	if moved {
		at, other, its, others = other, at, others, its
	}
	if p.does(at) != "running" || !p.has(at, "live") || !p.has(at, "next") || !its.lease || its.address != theAddress {
		t.Errorf("the domain is %q, and has %+v", p.does(at), its)
	}
	if p.does(other) != "" || others.lease || p.from.record != nil {
		t.Errorf("left on the other host: %q, %+v", p.does(other), others)
	}
}

// A domain of libvirt's moves, and goes back whatever libvirt makes of it; what libvirt does not know, nobody decides.
func TestDomain(t *testing.T) {
	t.Run("it moves", func(t *testing.T) {
		p := newDomainPair(t)
		var steps []Action
		d, err := p.move(t.Context(), p.record(), Forward, func(a Action) error {
			steps = append(steps, a)
			return nil
		}, nil)
		if err != nil || !d.Outcome.Moved || d.Outcome.Downtime == nil || *d.Outcome.Downtime != 12 {
			t.Fatalf("%v after %q: %+v", err, steps, d.Outcome)
		}
		p.ended(t, true)
	})

	for how, want := range map[string]error{"fails": nil, "lost": nil, "doubt": ErrInDoubt} {
		t.Run("libvirt: "+how, func(t *testing.T) {
			p := newDomainPair(t)
			if err := os.WriteFile(filepath.Join(p.here, "migrate"), []byte(how), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := p.move(t.Context(), p.record(), Forward, nil, nil)
			switch {
			case want != nil && (!errors.Is(err, want) || p.does(p.here) != "paused"):
				t.Fatalf("%v; it is %s", err, p.does(p.here))
			case want != nil:
				_, err = p.move(t.Context(), p.from.record, TakeBack, nil, nil)
				if err != nil {
					t.Error(err)
				}
			case how == "fails" && (err == nil || !strings.Contains(err.Error(), "Unable to read from monitor")):
				t.Errorf("it does not say why: %v", err)
			case how == "lost" && err != nil:
				t.Error(err)
			}
			p.ended(t, how == "lost")
		})
	}
}

// domainFault is what goes wrong once at a point of a domain's move, and what the user wants then.
type domainFault struct {
	point, what string // kill: a viaduct; turn: the user
	want        Wants
}

func domainFaults() (out []domainFault) {
	var points []string
	for _, a := range actions {
		points = append(points, string(a))
	}
	for _, w := range work {
		points = append(points, string(w))
	}
	for _, point := range points {
		for _, what := range []string{"kill", "turn"} {
			out = append(out, domainFault{point, what, Forward}, domainFault{point, what, Back})
		}
	}
	return out
}

// A viaduct that is killed at any step of a domain's move, or a user who turns round, leaves it to --resume or --cancel. A
// few points are tried, by a seed that is told, or with VIADUCT_SWEEP=all each of them.
func TestDomainFaults(t *testing.T) {
	for _, f := range some(t, domainFaults(), 8) {
		t.Run(fmt.Sprintf("%s before %s, then %s", f.what, f.point, f.want), func(t *testing.T) {
			p := newDomainPair(t)
			ctx, turn := context.WithCancel(t.Context())
			defer turn()
			done := false
			at := func(now string) error {
				if now != f.point || done {
					return nil
				}
				done = true
				if f.what == "kill" {
					return errKilled
				}
				turn()
				return nil
			}
			_, err := p.move(ctx, p.record(), Forward, func(a Action) error { return at(string(a)) },
				func(w Task) error { return at(string(w)) })
			tried := []error{err}
			for _, next := range []Wants{f.want, Forward} {
				if p.from.record != nil {
					again := *p.from.record
					_, err := p.move(t.Context(), &again, next, nil, nil)
					tried = append(tried, err)
				}
			}
			p.ended(t, p.does(p.there) == "running")
			if !done {
				t.Log("the move did not come to this point")
			}
			if t.Failed() {
				t.Logf("what was tried: %v", errors.Join(tried...))
			}
		})
	}
}
