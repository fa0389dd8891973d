package declared

import (
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// A later file of netplan's adds to what an earlier one says, key by key; lists grow, and all else is replaced.
func TestMerge(t *testing.T) {
	read := func(text string) *yaml.Node {
		t.Helper()
		var n yaml.Node
		if err := yaml.Unmarshal([]byte(text), &n); err != nil {
			t.Fatal(err)
		}
		return n.Content[0]
	}
	for _, c := range [][3]string{
		{"{a: 1}", "{b: 2}", "{a: 1, b: 2}"},
		{"{a: 1}", "{a: 2}", "{a: 2}"},
		{"{a: {b: 1, c: 2}}", "{a: {c: 3, d: 4}}", "{a: {b: 1, c: 3, d: 4}}"},
		{"{a: [1, 2]}", "{a: [3]}", "{a: [1, 2, 3]}"},
		{"{a: [1, 2]}", "{a: 3}", "{a: 3}"},
		{"{a: 1}", "{a: [3]}", "{a: [3]}"},
		{"{a: {b: 1}}", "{a: [3]}", "{a: [3]}"},
		{"{a: [3]}", "{a: {b: 1}}", "{a: {b: 1}}"},
		{"{a: 1, b: 2}", "{}", "{a: 1, b: 2}"},
	} {
		into := read(c[0])
		merge(into, read(c[1]))
		got, err := yaml.Marshal(into)
		if err != nil || strings.TrimSpace(string(got)) != c[2] {
			t.Errorf("%s and %s are %s, %v; want %s", c[0], c[1], got, err, c[2])
		}
	}
}

// A PF of netplan's that only has an e-switch mode has no VFs, and no range of them.
func TestNetplanWithoutVFs(t *testing.T) {
	k := sweptHost(t)
	for count, want := range map[string]int{"": 0, "\n      virtual-function-count: 0": 0,
		"\n      virtual-function-count: 2": 2} {
		writeFile(t, k, "etc/netplan/a.yaml",
			"network:\n  ethernets:\n    enp1s0:\n      embedded-switch-mode: switchdev"+count+"\n")
		s, notes, err := newManager(t, k, Options{}).Import("netplan")
		if err != nil || len(s.PFs) != 1 || s.PFs[0].Count != want || (len(s.PFs[0].VFs) > 0) != (want > 0) {
			t.Errorf("%q: %+v, %q, %v", count, s, notes, err)
		}
	}
}

// An undo tells what became of each, the last that was changed first.
func TestUndoTells(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", pf, "0000:00:08.0", nic, beside)
	if err := applyAll(k, many); err != nil {
		t.Fatal(err)
	}
	var told []string
	if err := undoTelling(k, func(a iommu.Address, err error) {
		if err != nil {
			t.Errorf("%s: %v", a, err)
		}
		told = append(told, a.String())
	}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(told, " "); got != nic+" "+pf {
		t.Errorf("told of %s", got)
	}
}
