package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// hosts are hosts as the world has them: captured ones, one of each kind that is made for this, and those of public
// reports where they are at hand.
func hosts(t *testing.T) map[string]hosttest.Tree {
	t.Helper()
	all := maps.Clone(hosttest.Kinds())
	for _, pattern := range []string{machines + "/*.txt", "../../../shared/cases/*/*.txt"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		if len(files) == 0 {
			t.Logf("no host is at %s: these are left out", pattern)
		}
		for _, f := range files {
			all[filepath.Base(filepath.Dir(f))+"/"+filepath.Base(f)] = hosttest.Load(t, f)
		}
	}
	return all
}

// Each host can be looked at with each command, and what is adopted of it is neither refused nor missed by its own plan.
func TestMatrix(t *testing.T) {
	for name, tree := range hosts(t) {
		// One after the other: the library of the command line has flags of its own for all of them.
		t.Run(name, func(t *testing.T) {
			dir := tree.Dir(t)
			do := func(line ...string) (string, int) {
				t.Helper()
				var stdout, stderr bytes.Buffer
				status := run(append([]string{"viaduct", "--host", dir}, line...), &stdout, &stderr)
				if status > 3 && line[0] != "plan" || status == exitUsage && line[0] != "show" {
					t.Errorf("%q: exit status %d: %s", line, status, stderr.String())
				}
				if status != 0 && stdout.Len()+stderr.Len() == 0 {
					t.Errorf("%q: exit status %d without a word", line, status)
				}
				return stdout.String(), status
			}

			for _, line := range []string{"list", "list --json", "list --tree", "vf list", "vf list --json", "pool",
				"iommu", "iommu --json", "why --all", "why --all --json"} {
				if out, status := do(strings.Fields(line)...); status != 0 {
					t.Errorf("%s: exit status %d: %s", line, status, out)
				}
			}
			if out, status := do("doctor", "--json"); status > 1 || !json.Valid([]byte(out)) {
				t.Errorf("doctor: exit status %d: %s", status, out)
			}
			h, err := iommu.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			topology, err := iommu.Scan(h)
			if err != nil {
				t.Fatal(err)
			}
			topology.All(func(d *iommu.Device) bool {
				if out, status := do("show", d.Name, "--json"); d.PCI && (status != 0 || !json.Valid([]byte(out))) {
					t.Errorf("show %s: exit status %d: %s", d.Name, status, out)
				}
				return true
			})
			for _, g := range topology.Groups {
				group := fmt.Sprintf("group=%d", g.ID)
				do("show", group)
				do("bind", "--dry-run", group)
				do("unbind", "--dry-run", group)
			}

			file := filepath.Join(t.TempDir(), "host.yaml")
			if out, status := do("adopt", "-o", file); status != 0 {
				t.Fatalf("adopt: %s", out)
			}
			out, _ := do("plan", "--json", "-f", file)
			var plan []struct{ Name, State, Error string }
			if err := json.Unmarshal([]byte(out), &plan); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			text, _ := os.ReadFile(file)
			for _, i := range plan {
				if i.State == "refused" || i.State == "missing" || i.State == "changed" {
					t.Errorf("%s is %s by its own plan: %s\n%s", i.Name, i.State, i.Error, text)
				}
			}
		})
	}
}

// What a dry run promises of a group, a kernel does: it is taken whole and given back as it was, or refused.
func TestPromises(t *testing.T) {
	for name, tree := range hosts(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first := iommu.Host{Host: hosttest.NewKernel(t, tree).Host()}
			topology, err := iommu.Scan(&first)
			if err != nil {
				t.Fatal(err)
			}
			for _, g := range topology.Groups {
				if len(g.Handed()) > 0 && g.Handed()[0].PCI {
					keepsPromise(t, tree, g.Handed()[0].Address)
				}
			}
		})
	}
}

func keepsPromise(t *testing.T, tree hosttest.Tree, a iommu.Address) {
	t.Helper()
	k := hosttest.NewKernel(t, tree)
	b, err := bind.Open(&iommu.Host{Host: k.Host()}, bind.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	state := func() (out []string) {
		topology, err := b.Scan()
		if err != nil {
			t.Fatal(err)
		}
		topology.All(func(d *iommu.Device) bool {
			out = append(out, d.Name+" "+d.Driver+" "+d.DriverOverride)
			return true
		})
		return out
	}

	before := state()
	d, err := iommu.ReadDevice(b.Host(), a)
	if err != nil {
		t.Fatal(err)
	}
	if d.VFIO {
		return
	}

	_, err = b.Move(t.Context(), bind.Take(bind.Auto), a)
	switch {
	case errors.Is(err, holder.ErrRefused):
		return
	case err != nil:
		if now := state(); !slices.Equal(now, before) {
			t.Errorf("%s: %v; left %q, was %q", a, err, now, before)
		}
		return
	}

	if _, err := b.Move(t.Context(), bind.GiveBack(), a); err != nil {
		t.Errorf("%s: given back: %v", a, err)
	}
	if now := state(); !slices.Equal(now, before) {
		t.Errorf("%s: given back %q, was %q", a, now, before)
	}
}
