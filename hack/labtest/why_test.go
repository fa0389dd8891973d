//go:build lab

package labtest

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// group is what `why --json` prints.
type group struct {
	Group    *int
	Members  []string
	Computed []string
	Agrees   *bool
	Edges    []edge
}

type edge struct {
	From     string
	To       *string
	Kind     string
	Isolated *bool
	Reason   string
}

// TestWhy compares the groups that viaduct computes from config space with those that the kernel made, on hosts of all
// shapes, with VFs wherever there can be some.
func TestWhy(t *testing.T) {
	makeVFs(t)
	giveGroups(t)
	text := do(t, "why", "--all", "--json")
	var all struct{ Groups []group }
	decode(t, text, &all)
	if want := len(names(groupsDir)); len(all.Groups) != want || want == 0 {
		t.Errorf("%d groups, the kernel has %d", len(all.Groups), want)
	}
	several, vfs := 0, 0
	for _, g := range all.Groups {
		if g.Group == nil {
			t.Errorf("no number: %v", g)
			continue
		}
		kernel := names(groupsDir, strconv.Itoa(*g.Group), "devices")
		slices.Sort(kernel)
		if !slices.Equal(g.Members, kernel) || !slices.Equal(g.Computed, kernel) || g.Agrees == nil || !*g.Agrees {
			t.Errorf("group %d: the kernel has %v, why has members %v, computed %v", *g.Group, kernel, g.Members,
				g.Computed)
			for _, e := range g.Edges {
				t.Logf("  %s %s %v: %s", e.From, e.Kind, e.To, e.Reason)
			}
		}
		if len(kernel) > 1 {
			several++
		}
		for _, m := range kernel {
			if link(devicesDir, m, "physfn") != "" {
				vfs++
			}
			if !slices.ContainsFunc(g.Edges, func(e edge) bool { return e.From == m && e.Kind == "path" }) {
				t.Errorf("group %d: no reason for %s", *g.Group, m)
			}
		}
	}
	t.Logf("%d groups agree, %d of several devices, %d VFs", len(all.Groups), several, vfs)

	for _, g := range all.Groups[:min(len(all.Groups), 4)] {
		var one, of group
		last := g.Members[len(g.Members)-1]
		decode(t, do(t, "why", last, "--json"), &one)
		decode(t, do(t, "why", "group="+strconv.Itoa(*g.Group), "--json"), &of)
		for _, got := range []group{one, of} {
			if !slices.Equal(got.Members, g.Members) || !slices.Equal(got.Computed, g.Computed) {
				t.Errorf("why %s: %v, with --all %v", last, got, g)
			}
		}
	}
	for line := range strings.Lines(do(t, "why", "--all")) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 {
			t.Errorf("a line of %d columns: %s", n, line)
		}
	}

	file := filepath.Join(t.TempDir(), "host.tar.gz")
	do(t, "snapshot", file)
	if again := do(t, "--host", file, "why", "--all", "--json"); again != text {
		t.Error("a snapshot gives other groups")
	}
}

// giveGroups has each device taken by vfio-pci and given back once: behind an SMMU, Linux 6.12 puts a device into a
// group only when it first meets a driver.
func giveGroups(t *testing.T) {
	if kind := os.Getenv("LAB_IOMMU"); kind == "amd-vi" || kind == "vt-d" {
		return
	}
	shell(t, "modprobe vfio-pci")
	for _, n := range names(devicesDir) {
		dir := filepath.Join(devicesDir, n)
		if strings.HasPrefix(attr(dir, "class"), "0x06") || link(dir, "driver") != "" {
			continue
		}
		shell(t, "cd "+dir+" && echo vfio-pci >driver_override && echo "+n+" >/sys/bus/pci/drivers_probe && "+
			"if [ -e driver ]; then echo "+n+" >driver/unbind; fi && echo >driver_override")
	}
}

// makeVFs gives each PF two VFs, if its driver makes some.
func makeVFs(t *testing.T) {
	if kind := os.Getenv("LAB_IOMMU"); kind != "amd-vi" && kind != "vt-d" {
		shell(t, "modprobe igb")
	}
	made := 0
	for _, n := range names(devicesDir) {
		dir := filepath.Join(devicesDir, n)
		if total := attr(dir, "sriov_totalvfs"); total == "" || total == "0" || link(dir, "driver") != "igb" ||
			attr(dir, "sriov_numvfs") != "0" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, "sriov_numvfs"), []byte("2"), 0); err != nil {
			t.Logf("no VFs of %s: %v", n, err)
			continue
		}
		t.Cleanup(func() { _ = os.WriteFile(filepath.Join(dir, "sriov_numvfs"), []byte("0"), 0) })
		made += 2
	}
	t.Logf("%d VFs made", made)
}

// TestConfig compares what is read in config space with what lspci says of it.
func TestConfig(t *testing.T) {
	dump := filepath.Join(t.TempDir(), "dump")
	t.Log(shell(t, "lspci -xxxx >"+dump+" && /job/lspcicheck lspci "+dump))
}

// TestWhyGuest assigns a VF, finds nothing wrong with it, breaks it, and is told of just that.
func TestWhyGuest(t *testing.T) {
	pf := byDriver("igb")[0]
	do(t, "vf", "create", pf, "1")
	t.Cleanup(func() { do(t, "vf", "destroy", pf) })
	do(t, "assign", "web", "--from", pf+"/vf0")
	t.Cleanup(func() { do(t, "release", "web") })
	vf := vfs(pf)[0]

	wrong := func() (out []string) {
		var v struct {
			Devices []string
			Lines   []struct {
				Name, Answer, Text string
				Evidence           []struct{ File string }
				Hint               *string `json:"cure"`
			}
		}
		decode(t, do(t, "why", "guest=web", "--json", "--memory", "1G"), &v)
		if !slices.Equal(v.Devices, []string{vf}) || len(v.Lines) < 12 {
			t.Errorf("%+v", v)
		}
		for _, l := range v.Lines {
			switch {
			case l.Answer == "no" && l.Hint == nil:
				t.Errorf("%s: %s, and nothing mends it", l.Name, l.Text)
			case l.Answer == "no":
				out = append(out, l.Name)
			// No process of the guest is there yet, whose limit and user could be looked at.
			case l.Answer == "unknown" && l.Name != "memlock" && l.Name != "nodes":
				t.Errorf("%s: %s", l.Name, l.Text)
			}
		}
		return out
	}
	if got := wrong(); len(got) > 0 {
		t.Errorf("wrong with what was just assigned: %v", got)
	}
	t.Log(do(t, "why", "web"))

	shell(t, "echo "+vf+" >/sys/bus/pci/drivers/vfio-pci/unbind")
	if got := wrong(); !slices.Equal(got, []string{"driver"}) {
		t.Errorf("wrong with what no driver has: %v", got)
	}
	shell(t, "echo "+vf+" >/sys/bus/pci/drivers/vfio-pci/bind")
}

// TestWhyPlainUser has no capability, so that config space ends after 64 bytes: what hangs on the rest is not known, and
// nothing is said to lack ACS.
func TestWhyPlainUser(t *testing.T) {
	nic := byDriver("igb")[0]
	r := run(t, "setpriv", "--reuid=nobody", "--clear-groups", viaduct, "why", nic, "--json")
	if r.status != 0 {
		t.Fatalf("exit status %d: %s", r.status, r.stderr)
	}
	var g group
	decode(t, r.stdout, &g)
	if g.Group == nil || len(g.Members) == 0 || g.Computed != nil || g.Agrees != nil ||
		strings.Contains(r.stdout, "no ACS") {
		t.Error(r.stdout)
	}
}
