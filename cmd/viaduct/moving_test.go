package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/migrate"
	"viaduct/cmd/internal/vmm"
	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/sriov"
)

// otherHost is a way to another host that runs, which is this test as a program of its own.
func otherHost(t *testing.T) string {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return "exec:env " + live + "='migrate\n--peer' '" + program + "' -test.run='^TestLive$'"
}

// movableHost is a host with a guest that can be moved but for its QEMU, which does not run.
func movableHost(t *testing.T) (*hosttest.Kernel, *env) {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	mustOnKernel(t, k, "vf", "create", sweptPF, "2")
	line := "assign web --from " + sweptVF + " --mac 52:54:00:aa:00:01 --vlan 7 --memory 1G --movable --no-reset"
	mustOnKernel(t, k, strings.Fields(line)...)
	return k, &env{openHost: func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}}
}

// A check asks both hosts, and says why the guest is not ready; a move that is not ready changes nothing on either.
func TestCheckOfMove(t *testing.T) {
	k, _ := movableHost(t)
	to := otherHost(t)
	before := allOf(t, k)
	for _, more := range [][]string{{"--check"}, {"--check", "--json"}, {"--dry-run"}, nil} {
		a := onKernel(k, append([]string{"migrate", "web", "--to", to}, more...)...)
		text := a.text()
		if a.status != exitRefused || !strings.Contains(text, "QEMU") || !strings.Contains(text, "the other host") {
			t.Errorf("%q: %+v", more, a)
		}
	}
	now := allOf(t, k)
	for _, name := range []string{"var/lib/viaduct/move-web.json", "run/viaduct/lease-web.json"} {
		if now[name] != before[name] {
			t.Errorf("/%s is %q, was %q", name, now[name], before[name])
		}
	}

	for line, says := range map[string]string{
		"migrate db --to exec:true --check": "db", "migrate web --to exec:true --check": "the other host",
		"migrate web --to exec: --check": "of which command",
	} {
		a := onKernel(k, strings.Fields(line)...)
		if a.status == exitDone || a.status == exitRefused || !strings.Contains(a.text(), says) {
			t.Errorf("%s: %+v", line, a)
		}
	}
}

// recordOf is what is written down of a move.
func recordOf(source bool, phase migrate.Phase) *migrate.Record {
	return &migrate.Record{
		ID: migrate.NewID(), Guest: "web", Phase: phase, Source: source, Peer: "exec:false", Socket: "/nowhere",
		Order: migrate.Order{
			Way: migrate.ByReplug, From: "net", Count: 1, Settings: sriov.Settings{sriov.VLAN: "7"},
			VM: vmm.Machine{Format: "qemu"},
		},
	}
}

// Memory that comes for a guest whose QEMU has ended meanwhile is told to go nowhere.
func TestDataOfMove(t *testing.T) {
	k, e := movableHost(t)
	h, err := e.open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	side, r := e.side(h, 0), recordOf(false, migrate.Loading)
	house := side.House()
	if err := errors.Join(side.Home().Save(context.Background(), r), house.Save(r)); err != nil {
		t.Fatal(err)
	}
	status, said := typedIn(t, k, "memory", "migrate", "--peer", "--data", r.ID)
	if status != exitFailed || !strings.Contains(said, "/nowhere") {
		t.Errorf("exit status %d: %s", status, said)
	}
}

// A side of a move neither begins nor looks by a declaration that cannot be read.
func TestSideThatFails(t *testing.T) {
	k, e := movableHost(t)
	h, err := e.open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	side := e.side(h, 0)
	put(t, k, hostfile.File, "pfs: [ {")
	if _, _, _, err := side.Leases(context.Background()); err == nil || exitStatus(err) != exitUsage {
		t.Errorf("it begins: %v", err)
	}
	if _, _, err := side.Look(); err == nil || exitStatus(err) != exitUsage {
		t.Errorf("it looks: %v", err)
	}
}

// What is written down of a move stands in the way of another, until it is finished or taken back, which each side can
// be asked for.
func TestMendMove(t *testing.T) {
	for name, c := range map[string]struct {
		record *migrate.Record
		line   string
		status int
		says   string
		left   bool
	}{
		"none is known": {nil, "--cancel", exitFailed, "does not move", false},
		"another begins": {recordOf(true, migrate.Checked), "--to exec:false", exitFailed,
			"another move of web is not over", true},
		"its QEMU has ended": {recordOf(true, migrate.Checked), "--resume", exitFailed,
			"web is here, as it was", false},
		"it can go no way": {recordOf(true, migrate.Checked), "--resume --to exec:", exitUsage, "of which command", true},
		"it is not expected any more": {recordOf(false, migrate.Checked), "--cancel", exitDone,
			"web is not expected here any more", true},
		"it is not this side's to know": {recordOf(false, migrate.Checked), "--resume", exitFailed,
			"--resume there", true},
	} {
		k, e := movableHost(t)
		h, err := e.open()
		if err != nil {
			t.Fatal(err)
		}
		side := e.side(h, 0)
		if c.record != nil {
			house := side.House()
			err = side.Home().Save(context.Background(), c.record)
			if !c.record.Source {
				err = errors.Join(err, house.Save(c.record))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		a := onKernel(k, append([]string{"migrate", "web"}, strings.Fields(c.line)...)...)
		left, err := side.Record("web")
		if a.status != c.status || !strings.Contains(a.text(), c.says) || err != nil || (left != nil) != c.left {
			t.Errorf("%s: %+v, %v, is left: %v", name, a, err, left)
		}
		h.Close()
	}
}

// greeting is what QEMU begins with (docs/interop/qmp-spec.rst of QEMU).
const greeting = `{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}}`

// answers has somebody answer at a socket as QEMU does.
func answers(t *testing.T, socket string) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, greeting+"\r\n")
			for lines := bufio.NewScanner(c); lines.Scan(); {
				var asked struct {
					ID any `json:"id"`
				}
				_ = json.Unmarshal(lines.Bytes(), &asked)
				_ = json.NewEncoder(c).Encode(map[string]any{"return": map[string]any{}, "id": asked.ID})
			}
		}
	}()
}

// The record of a move says what the other host is to give the guest, and how the move is driven.
func TestNewRecord(t *testing.T) {
	k, e := movableHost(t)
	h, err := e.open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	report, g := &migrate.Report{By: migrate.ByReplug}, &migrate.Guest{From: "net"}
	make := func(o *migrateOptions) (*migrate.Record, error) {
		return e.newRecord(context.Background(), h, o, report, g)
	}
	o := &migrateOptions{guest: "web", to: "there"}
	if r, err := make(o); err == nil {
		t.Errorf("of one whose QEMU does not run: %+v", r)
	}
	answers(t, migrate.SocketOf(h, "web"))
	r, err := make(o)
	if err != nil {
		t.Fatal(err)
	}
	if r.Guest != "web" || !r.Source || r.Peer != "there" || r.Phase != migrate.Checked ||
		r.Socket != migrate.SocketOf(h, "web") {
		t.Errorf("%+v", r)
	}
	if o := r.Order; o.From != "net" || o.Count != 1 || o.Address != "52:54:00:aa:00:01" || o.Way != migrate.ByReplug ||
		o.VM.Memory != 1<<30 || o.Settings[sriov.VLAN] != "7" || o.Settings[sriov.MAC] != "" {
		t.Errorf("its order is %+v", o)
	}
	o.wish.Pool = "other"
	if r, err := make(o); err != nil || r.Order.From != "other" {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := make(&migrateOptions{guest: "db", to: "there"}); err == nil {
		t.Errorf("of no guest: %+v", r)
	}
	mustOnKernel(t, k, "assign", "old", "--from", "0000:01:10.2", "--mac", "52:54:00:aa:00:02", "--no-reset")
	if r, err := make(&migrateOptions{guest: "old", to: "there"}); err == nil ||
		!strings.Contains(err.Error(), "--movable") {
		t.Errorf("of one that has no socket: %+v, %v", r, err)
	}
	for _, name := range []string{"command-web.json", "lease-web.json"} {
		put(t, k, "run/viaduct/"+name, "{")
		if r, err := make(o); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s cannot be read: %+v, %v", name, r, err)
		}
	}
}

// libvirt here reaches libvirt there by what the user says, or as the user reaches the host.
func TestLibvirtURI(t *testing.T) {
	for _, c := range []struct {
		o       migrateOptions
		want    string
		refused bool
	}{
		{migrateOptions{to: "there"}, "qemu+ssh://there/system", false},
		{migrateOptions{to: "there", uri: "qemu+tls://x/system"}, "qemu+tls://x/system", false},
		{migrateOptions{to: "exec:x", uri: "qemu+tls://x/system"}, "qemu+tls://x/system", false},
		{migrateOptions{to: "exec:x"}, "", true},
		{migrateOptions{to: "there", limits: migrate.Limits{Downtime: 1}}, "", true},
	} {
		got, err := c.o.libvirtURI()
		if got != c.want || (err != nil) != c.refused || err != nil && exitStatus(err) != exitUsage {
			t.Errorf("%+v: %q, %v", c.o, got, err)
		}
	}
}

// A guest is reached over its bridge, or over its PF.
func TestProbeOver(t *testing.T) {
	_, e := movableHost(t)
	h, err := e.open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	over := func(standby, pf string) string {
		r := &migrate.Record{Guest: "web", Order: migrate.Order{VM: vmm.Machine{Standby: standby}}}
		name, err := probeOver(h, r, &migrate.Guest{Devices: []migrate.GuestDevice{{PF: pf}}})
		if err != nil {
			return "error"
		}
		return name
	}
	for _, c := range [][3]string{
		{"br0", sweptPF, "br0"}, {"", sweptPF, "enp1s0"}, {"", "0000:00:05.0", "error"}, {"", "0000:77:00.0", "error"},
	} {
		if got := over(c[0], c[1]); got != c[2] {
			t.Errorf("%q: over %q, not %q", c, got, c[2])
		}
	}
}
