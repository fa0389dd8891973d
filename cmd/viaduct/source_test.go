package main

import (
	"encoding/json"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// What is drawn is said in words of one source, and what one does not say, the other options do.
func TestParseSource(t *testing.T) {
	common := []string{"vlan=100", "trust=on"}
	for text, want := range map[string]string{
		"net":                     "net 2 vlan=100 trust=on",
		"net,count=3,vlan=7":      "net 3 vlan=7 trust=on",
		"net,vlan=200+index":      "net 2 vlan=200+index trust=on",
		"0000:01:10.0,mac=stable": "0000:01:10.0 2 mac=stable vlan=100 trust=on",
		"mac=52:54:00:00:00:01":   "mac=52:54:00:00:00:01 2 vlan=100 trust=on",
		"net,count=x":             `invalid count "x"`,
		"net,count=0":             "want one or more",
		",vlan=7":                 "it names nothing",
		"net,msix=4":              "msix cannot be set for a guest",
		"net,speed=7":             "speed",
		"net,vlan=9999":           "9999",
	} {
		s, err := parseSource(text, 2, common)
		if err != nil {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", text, err)
			}
			continue
		}

		words := strings.Fields(want)
		if got := strings.Fields(s.Settings.Text()); s.From != words[0] || len(got) != len(words)-2 {
			t.Errorf("%s: %+v", text, s)
		}

		for _, w := range words[2:] {
			if !strings.Contains(s.Settings.Text(), w) {
				t.Errorf("%s: %s is missing of %s", text, w, s.Settings.Text())
			}
		}
	}
}

// One address is for one VF, however many sources it is said for.
func TestOneAddress(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	a := onKernel(k, "assign", "web", "--from", "0000:01:00.0", "--from", "0000:02:00.0", "--mac", "52:54:00:aa:00:01")
	if a.status != exitUsage || !strings.Contains(a.stderr, "for 2 VFs") {
		t.Errorf("exit status %d: %s", a.status, a.stderr)
	}
}

// What a boot makes untrue of what is printed is said, where the lease outlives one.
func TestNumbersOfABoot(t *testing.T) {
	const note = "numbers of IOMMU groups"
	for line, told := range map[string]bool{
		"--format cdi --persist": true, "--format kata --persist": true, "--format cdi": false,
		"--format libvirt": false,
	} {
		k := hosttest.NewLab(t, nil)
		mustOnKernel(t, k, "vf", "create", "0000:01:00.0", "2")
		a := mustOnKernel(t, k, append([]string{"assign", "web", "--from", "0000:01:00.0"}, strings.Fields(line)...)...)
		if strings.Contains(a.stderr, note) != told {
			t.Errorf("%s: %s", line, a.stderr)
		}
	}
}

// A setting with +index is another one for each VF; the lease holds what was typed, and asked again it is the same.
func TestSettingByIndex(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	mustOnKernel(t, k, "vf", "create", "0000:01:00.0", "3")
	line := []string{"assign", "web", "--from", "0000:01:00.0", "--count", "2", "--vlan", "100+index",
		"--format", "json"}
	dry := mustOnKernel(t, k, append(line[:len(line)-2:len(line)-2], "--steps")...)
	for _, want := range []string{"vf 0 vlan 100", "vf 1 vlan 101"} {
		if !strings.Contains(dry.stdout, want) {
			t.Errorf("%q is missing of the dry run:\n%s", want, dry.stdout)
		}
	}

	for range 2 {
		var got leaseView
		if err := json.Unmarshal([]byte(mustOnKernel(t, k, line...).stdout), &got); err != nil {
			t.Fatal(err)
		}
		var vlans []string
		for _, d := range got.Devices {
			vlans = append(vlans, *d.VLAN)
		}
		if text := strings.Join(vlans, " "); text != "100 101" || got.Sources[0].Settings.Text() != "vlan=100+index" {
			t.Errorf("VLANs %s, settings %s", text, got.Sources[0].Settings.Text())
		}
	}

	far := onKernel(k, "assign", "db", "--from", "0000:01:00.0", "--vlan", "4093+index")
	if far.status != exitRefused || !strings.Contains(far.stderr, "vf2: vlan=4095") {
		t.Errorf("exit status %d: %s", far.status, far.stderr)
	}
}
