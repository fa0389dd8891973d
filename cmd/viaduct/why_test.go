package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"viaduct/internal/host/hosttest"
)

// on runs a command line on a tree, and returns all that it said.
func on(t *testing.T, dir, line string) (stdout, all string) {
	t.Helper()
	var out, stderr bytes.Buffer
	status := run(append([]string{"viaduct", "--host", dir}, strings.Fields(line)...), &out, &stderr)
	all = fmt.Sprintf("%s== stderr\n%s== exit status %d\n", out.String(), stderr.String(), status)
	return out.String(), strings.ReplaceAll(all, dir, "HOST")
}

// cutConfig is a tree as a plain user captures it: config space ends after 64 bytes.
func cutConfig(tree hosttest.Tree) hosttest.Tree {
	out := tree.With(nil)
	for name, content := range out {
		if path.Base(name) == "config" {
			out[name] = content[:64]
		}
	}
	return out
}

// override is a tree whose kernel was told to take two functions for isolated.
func override(t *testing.T, tree hosttest.Tree) hosttest.Tree {
	t.Helper()
	const device = "sys/devices/pci0000:00/0000:00:09.0/0000:0c:00.1"
	old, ok := strings.CutPrefix(tree[device+"/iommu_group"], "-> ../../../../kernel/iommu_groups/")
	link := "sys/kernel/iommu_groups/" + old + "/devices/0000:0c:00.1"
	if !ok || tree[link] == "" {
		t.Fatalf("%s is in group %q", device, old)
	}
	return tree.With(hosttest.Tree{
		"proc/cmdline":          "root=/dev/vda pcie_acs_override=downstream,multifunction\n",
		device + "/iommu_group": "-> ../../../../kernel/iommu_groups/99",
		link:                    hosttest.Gone,
		"sys/kernel/iommu_groups/99/devices/0000:0c:00.1": tree[link],
		"sys/kernel/iommu_groups/99/type":                 "DMA\n",
	})
}

// TestGoldenWhy runs why on a captured host of the lab: as a folder and a snapshot, with part of config space, and with
// groups that config space does not give.
func TestGoldenWhy(t *testing.T) {
	whole := hosttest.Load(t, filepath.Join(machines, "why.txt"))
	for name, c := range map[string]struct {
		tree hosttest.Tree
		line string
	}{
		"port":           {whole, "why 00:06.0"},
		"alone":          {whole, "why 01:00.0"},
		"vf":             {whole, "why 05:00.0/vf1"},
		"switch":         {whole, "why 0a:00.0"},
		"conventional":   {whole, "why 0b:02.0"},
		"functions":      {whole, "why 0c:00.1"},
		"functions.json": {whole, "why 0c:00.1 --json"},
		"ports":          {whole, "why 00:10.1"},
		"acs-off":        {whole, "why 10:00.0"},
		"chipset":        {whole, "why 00:1f.3"},
		"none":           {whole, "why 00:04.0"},
		"none.json":      {whole, "why 00:04.0 --json"},
		"all.json":       {whole, "why --all --json"},
		"part":           {cutConfig(whole), "why 0c:00.1"},
		"part.json":      {cutConfig(whole), "why 0c:00.1 --json"},
		"override":       {override(t, whole), "why 0c:00.1"},
		"override.json":  {override(t, whole), "why 0c:00.1 --json"},
		"no-selector":    {whole, "why"},
		"no-device":      {whole, "why 00:0b.0"},
		"no-group":       {whole, "why group=77"},
		"too-many":       {whole, "why class=0200"},
	} {
		for kind, dir := range map[string]string{"folder": c.tree.Dir(t), "snapshot": c.tree.Snapshot(t)} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				stdout, all := on(t, dir, c.line)
				if strings.HasSuffix(name, ".json") && !json.Valid([]byte(stdout)) {
					t.Errorf("no valid JSON:\n%s", stdout)
				}
				compareGolden(t, filepath.Join("testdata", "why", name+".golden"), all)
				for line := range strings.Lines(stdout) {
					if n := len([]rune(strings.TrimSuffix(line, "\n"))); !json.Valid([]byte(stdout)) && n > 80 {
						t.Errorf("a line of %d columns: %s", n, line)
					}
				}
			})
		}
	}
}

// Every group of the captured host is computed as the kernel has it; with part of config space none is said to differ.
func TestWhyAll(t *testing.T) {
	whole := hosttest.Load(t, filepath.Join(machines, "why.txt"))
	for name, tree := range map[string]hosttest.Tree{"whole": whole, "part": cutConfig(whole)} {
		stdout, _ := on(t, tree.Dir(t), "why --all --json")
		var v struct {
			Groups []struct {
				Group             int
				Members, Computed []string
				Agrees            *bool
			}
		}
		if err := json.Unmarshal([]byte(stdout), &v); err != nil || len(v.Groups) < 20 {
			t.Fatalf("%s: %v, %d groups", name, err, len(v.Groups))
		}
		for _, g := range v.Groups {
			switch {
			case g.Agrees == nil && (name == "whole" || g.Computed != nil), g.Agrees != nil && !*g.Agrees,
				g.Agrees != nil && !slices.Equal(g.Members, g.Computed):
				t.Errorf("%s: %+v", name, g)
			}
		}
	}
}

// list and its like read no config space: that wakes devices, and takes long. why of one device reads that of those
// alone that matter.
func TestConfigUnread(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	read := func(line string) []string {
		var mu sync.Mutex
		var of []string
		k.SetFault(func(_, name string) error {
			if path.Base(name) == "config" {
				mu.Lock()
				defer mu.Unlock()
				of = append(of, path.Base(path.Dir(name)))
			}
			return nil
		})
		mustOnKernel(t, k, strings.Fields(line)...)
		slices.Sort(of)
		return slices.Compact(of)
	}
	for _, line := range []string{"list", "list --tree", "list --json", "show group=7", "leases"} {
		if of := read(line); len(of) > 0 {
			t.Errorf("%s reads config space of %v", line, of)
		}
	}
	if of, want := read("why 02:10.0"), []string{"0000:00:06.0"}; !slices.Equal(of, want) {
		t.Errorf("why reads config space of %v, want %v", of, want)
	}
}
