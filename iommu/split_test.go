package iommu

import (
	"fmt"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// What a parameter of the kernel names is found as the kernel finds it.
func TestNamed(t *testing.T) {
	h, _ := openTree(t, tree([]part{
		{path: port, kind: RootPort, ids: "8086:1901:1043:8694"}, {path: port + "/0000:01:00.0", kind: UpstreamPort},
		{path: port + "/0000:01:00.0/0000:02:08.1", kind: DownstreamPort}, {path: "0001:00:01.0", kind: RootPort},
	}))
	g, err := NewGrouping(h)
	if err != nil {
		t.Fatal(err)
	}
	for device, want := range map[string]string{
		"00:01.0": "0000:00:01.0", "0000:00:01.0": "0000:00:01.0", "0:0:1.0": "0000:00:01.0",
		"0001:00:01.0": "0001:00:01.0",
		"02:08.1":      "0000:02:08.1", "00:01.0/00.0": "0000:01:00.0", "00:01.0/00.0/08.1": "0000:02:08.1",
		"01:00.0/08.1": "0000:02:08.1",
		"00:01.0/08.1": "", "00:02.0": "", "00:01.0/00.1": "", "": "", "/": "", "x": "", "00:01": "",
		"pci:8086:1901": "0000:00:01.0", "pci:8086:0": "0000:00:01.0", "pci:8086:1901:1043:8694": "0000:00:01.0",
		"pci:8086:1901:1043:8695": "", "pci:8086": "", "pci:": "", "pci:8086:x": "", "pci:8086:1901:1043": "",
	} {
		var got []string
		for _, n := range g.order {
			if g.named(n, device) {
				got = append(got, n.at.String())
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q names %v, want %s", device, got, want)
		}
	}
}

// Where ACS is off that a port has, the parameter that has it off goes as this host's boot loader has it, and no other
// parameter; else the kernel turns ACS on at a boot.
func TestACSHint(t *testing.T) {
	const again, off = "boot again: ", "turn the IOMMU on"
	for name, c := range map[string]struct {
		line, acs string
		units     bool
		want      string
	}{
		"nothing on the line": {"quiet", "1d/00", true, again},
		"no IOMMU":            {"quiet", "1d/00", false, off},
		"the port": {"quiet pci=disable_acs_redir=00:01.0", "1d/11", true,
			"remove pci=disable_acs_redir=00:01.0 from GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` and reboot"},
		"beside others": {"pci=nommconf,disable_acs_redir=00:02.0;00:01.0", "1d/11", true,
			"remove pci=nommconf,disable_acs_redir=00:02.0;00:01.0 from GRUB_CMDLINE_LINUX in /etc/default/grub, " +
				"run `update-grub` and reboot, but keep pci=nommconf"},
		"another port":         {"pci=disable_acs_redir=00:02.0", "1d/11", true, again},
		"what it never clears": {"pci=disable_acs_redir=00:01.0", "1d/0c", true, again},
		"without pci=":         {"disable_acs_redir=00:01.0", "1d/11", true, again},
		"as others have one":   {"config_acs=xx0x@00:01.0", "1d/19", true, again},
		"a pattern": {"pci=config_acs=xx0xx@00:01.0", "1d/19", true,
			"remove pci=config_acs=xx0xx@00:01.0 from "},
		"a pattern of another":     {"pci=config_acs=xx0xx@00:02.0", "1d/19", true, again},
		"a pattern that has it on": {"pci=config_acs=11111@00:01.0", "1d/19", true, again},
		"a pattern among several":  {"pci=config_acs=11111@00:02.0;x@00:01.0", "1d/19", true, "remove pci=config_acs="},
		"a pattern without device": {"pci=config_acs=000", "1d/19", true, again},
	} {
		more := hosttest.Tree{
			"proc/cmdline": c.line + "\n", "usr/sbin/update-grub": "",
			"etc/default/grub": "GRUB_CMDLINE_LINUX=\"" + c.line + "\"\n",
		}

		if c.units {
			more["sys/class/iommu/ivhd0"] = "-> ../../devices/virtual/iommu/ivhd0"
			more["sys/devices/virtual/iommu/ivhd0/"] = ""
		}

		h, _ := openTree(t, tree([]part{{path: port, kind: RootPort, acs: c.acs},
			{path: port + "/0000:01:00.0"}}).With(more))
		g, err := NewGrouping(h)
		if err != nil {
			t.Fatal(err)
		}

		var got string
		for _, e := range g.Edges([]Address{{Bus: 1}}) {
			if e.Hint != "" {
				got = e.Hint
			}
		}

		if !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// Functions without ACS are told of also where the port above has them in one group: another slot does not separate them.
func TestFunctionsBelowAnOpenPort(t *testing.T) {
	const nic = port + "/0000:01:00."
	for name, c := range map[string]struct {
		functions []part
		want      string
	}{
		"without ACS": {[]part{{path: nic + "0", many: true}, {path: nic + "1"}},
			"function true nothing separates these functions"},
		"with ACS": {[]part{{path: nic + "0", many: true, acs: on}, {path: nic + "1", acs: on}}, ""},
		"one with ACS that is off": {[]part{{path: nic + "0", many: true}, {path: nic + "1", acs: "5d/00"}},
			"function false turn the IOMMU on"},
		"conventional": {[]part{{path: nic + "0", many: true, kind: none}, {path: nic + "1", kind: none}},
			"function true nothing separates these functions"},
	} {
		h, _ := openTree(t, tree(append(c.functions, part{path: port, kind: RootPort})))
		g, err := NewGrouping(h)
		if err != nil {
			t.Fatal(err)
		}

		var got string
		for _, e := range g.Edges([]Address{{Bus: 1}, {Bus: 1, Function: 1}}) {
			if e.Kind == EdgeFunction && e.Hint != "" {
				got += fmt.Sprint(e.Kind, " ", e.Fixed, " ", e.Hint)
			}
			if !strings.Contains(e.Reason, e.Because) || e.Because == "" {
				t.Errorf("%s: %+v", name, e)
			}
		}

		if !strings.HasPrefix(got, c.want) || (got == "") != (c.want == "") {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
