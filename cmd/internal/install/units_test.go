package install

import (
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// match is one of the keys of a udev rule, as KEY{of}OP"value".
var match = regexp.MustCompile(`^([A-Z]+)(?:\{(\w+)\})?(==|!=|\+=|=)"(.*)"$`)

// marks reports whether the rule leaves a mark for an event: its action, its subsystem, and its device's attributes.
func marks(t *testing.T, action, subsystem string, attributes map[string]string) bool {
	t.Helper()
	for line := range strings.Lines(rule[:strings.Index(rule, "LABEL=")]) {
		applies, runs := true, false
		for part := range strings.SplitSeq(strings.TrimSpace(line), ", ") {
			m := match.FindStringSubmatch(part)
			if m == nil {
				continue
			}
			var is bool
			value, known := attributes[m[2]]
			globs := func(text string) bool {
				return slices.ContainsFunc(strings.Split(m[4], "|"), func(p string) bool {
					ok, err := path.Match(p, text)
					return ok && err == nil
				})
			}
			switch m[1] {
			case "ACTION":
				is = globs(action)
			case "SUBSYSTEM":
				is = globs(subsystem)
			case "ATTR", "ATTRS":
				is = known && globs(value)
			case "TEST":
				_, is = attributes[m[4]]
			case "RUN":
				runs = strings.Contains(m[4], mark)
				continue
			case "GOTO":
				if applies {
					return false
				}
				continue
			default:
				t.Fatalf("the key %s of %q is not known here", m[1], part)
			}
			applies = applies && is == (m[3] == "==")
		}
		if applies && runs {
			return true
		}
	}

	return false
}

// Any device that comes later leaves a mark, but VFs and bridges; and a PF once more with its interface.
func TestRule(t *testing.T) {
	for name, c := range map[string]struct {
		action, subsystem string
		attributes        map[string]string
		want              bool
	}{
		"a NIC":             {"add", "pci", map[string]string{"class": "0x020000", "sriov_totalvfs": "8"}, true},
		"a GPU":             {"add", "pci", map[string]string{"class": "0x030000"}, true},
		"a VF":              {"add", "pci", map[string]string{"class": "0x020000", "physfn": ""}, false},
		"a bridge":          {"add", "pci", map[string]string{"class": "0x060400"}, false},
		"a GPU that goes":   {"remove", "pci", map[string]string{"class": "0x030000"}, false},
		"a driver's change": {"bind", "pci", map[string]string{"class": "0x030000"}, false},
		"a PF's interface":  {"add", "net", map[string]string{"sriov_totalvfs": "8"}, true},
		"a controller":      {"add", "nvme", map[string]string{"sriov_totalvfs": "8"}, true},
		"a plain interface": {"add", "net", nil, false},
		"a disk":            {"add", "block", map[string]string{"sriov_totalvfs": "8"}, false},
	} {
		if got := marks(t, c.action, c.subsystem, c.attributes); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// The mark starts the unit as long as it is there, and is taken away before the unit looks: none is lost that comes while
// one ends. No boot waits for the network, or for what stands on it.
func TestUnitsOrder(t *testing.T) {
	if !strings.Contains(hotplugPath, "\nPathExists="+mark+"\n") ||
		!strings.Contains(hotplugPath, "TriggerLimitIntervalSec=0") {
		t.Errorf("started once and not again:\n%s", hotplugPath)
	}

	taken, looks := strings.Index(hotplug, "ExecStartPre=/bin/rm -f "+mark),
		strings.Index(hotplug, "ExecStart=%s watch --once")
	if taken < 0 || looks < taken || !strings.Contains(hotplug, "StartLimitIntervalSec=0") {
		t.Errorf("the mark is taken away after the look:\n%s", hotplug)
	}

	before := func(unit string) []string {
		var out []string
		for line := range strings.Lines(unit) {
			if names, ok := strings.CutPrefix(line, "Before="); ok {
				out = append(out, strings.Fields(names)...)
			}
		}
		return out
	}

	for line := range strings.Lines(early) {
		key, names, _ := strings.Cut(strings.TrimSpace(line), "=")
		for name := range strings.FieldsSeq(names) {
			switch {
			case key != "After" && key != "RequiresMountsFor" && key != "Requires" && key != "Wants":
			case strings.Contains(name, "remote") || name == "network-online.target" || strings.HasPrefix(name, "/var"):
				t.Errorf("the boot waits for %s, which the network may bring: %s", name, line)
			case key == "After" && slices.Contains(before(early), name):
				t.Errorf("the boot waits for what waits for it: %s", name)
			}
		}
	}

	if !slices.Contains(before(early), "network-pre.target") || !strings.Contains(early, "DefaultDependencies=no") {
		t.Errorf("the boot is not before the network:\n%s", early)
	}
}
