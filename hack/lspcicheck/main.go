// Command lspcicheck compares what viaduct reads in config space with what lspci does: of each device of a dump (lspci
// -xxxx), the type, resets, ACS, ARI, ATS, PRI, PASID and SR-IOV.
//
//	lspcicheck LSPCI DUMP...
package main

import (
	"bytes"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"viaduct/iommu"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 {
		log.Fatal("usage: lspcicheck LSPCI DUMP...")
	}
	total := count{}
	for _, file := range os.Args[2:] {
		n, err := check(func(dump string) ([]byte, error) {
			return exec.Command(os.Args[1], "-vvv", "-F", dump).Output()
		}, file)
		if err != nil {
			log.Fatalf("%s: %v", file, err)
		}
		total.add(n)
	}
	fmt.Println(total)
}

// count is how many devices were compared, and how many lines of each kind.
type count map[string]int

func (c count) add(other count) {
	for k, n := range other {
		c[k] += n
	}
}

func (c count) String() string {
	words := []string{fmt.Sprintf("%d devices agree", c["device"])}
	for _, k := range append(kinds[:], "flr") {
		words = append(words, fmt.Sprintf("%d %s", c[k], k))
	}
	return strings.Join(words, ", ")
}

var kinds = [...]string{"ACS", "ARI", "ATS", "PRI", "PASID", "IOV"}

// check compares one dump.
func check(lspci func(dump string) ([]byte, error), file string) (count, error) {
	dump, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}

	configs := parseDump(string(dump))
	text, err := lspci(file)
	if err != nil {
		return nil, fmt.Errorf("lspci: %w", err)
	}

	n := count{}
	blocks := strings.Split(strings.TrimSpace(string(text)), "\n\n")
	if len(blocks) != len(configs) {
		return nil, fmt.Errorf("lspci tells of %d devices, and the dump has %d", len(blocks), len(configs))
	}

	var wrong []error
	for _, block := range blocks {
		name, _, _ := strings.Cut(block, " ")
		a, err := iommu.ParseAddress(name)
		if err != nil {
			return nil, err
		}
		f, err := iommu.DecodeFunction(bytes.NewReader(configs[a]), 4096)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		got, want := describe(f), lines(block)
		n["device"]++
		for _, k := range kinds {
			if _, has := want[k+"Cap"]; has || k == "PRI" && want["PRICtl"] != "" {
				n[k]++
			}
		}
		if f.FLR() {
			n["flr"]++
		}
		for k := range merge(got, want) {
			// lspci does not tell of the second set of registers where it is not there.
			if got[k] != want[k] && (got[k] != "ARIFwd-" || want[k] != "") {
				wrong = append(wrong, fmt.Errorf("%s: %s is %q, lspci has %q", name, k, got[k], want[k]))
			}
		}
	}

	return n, errors.Join(wrong...)
}

func merge(a, b map[string]string) map[string]bool {
	out := map[string]bool{}
	for k := range a {
		out[k] = true
	}
	for k := range b {
		out[k] = true
	}
	return out
}

var (
	dumpHead = regexp.MustCompile(`^((?:[0-9a-f]{4,}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])\b`)
	dumpRow  = regexp.MustCompile(`^([0-9a-f]{2,3}): ((?:[0-9a-f]{2}(?: |$))+)`)
)

// parseDump reads the bytes that lspci -x, -xxx or -xxxx has printed.
func parseDump(text string) map[iommu.Address][]byte {
	out := map[iommu.Address][]byte{}
	var of iommu.Address
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		if m := dumpHead.FindStringSubmatch(line); m != nil {
			if a, err := iommu.ParseAddress(m[1]); err == nil {
				of, out[a] = a, nil
			}
			continue
		}
		m := dumpRow.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if at, _ := strconv.ParseUint(m[1], 16, 12); int(at) != len(out[of]) {
			continue
		}
		for b := range strings.FieldsSeq(m[2]) {
			v, _ := strconv.ParseUint(b, 16, 8)
			out[of] = append(out[of], byte(v))
		}
	}
	return out
}

// told are what is compared of lspci's text, by the word that it begins with: of each the first.
var told = []struct {
	key     string
	pattern *regexp.Regexp
}{
	{"type", regexp.MustCompile(`\] Express (?:\(v\d+\) )?([^,\n]*?)(?: \(Slot[+-]\)|, |\n)`)},
	{"FLReset", regexp.MustCompile(`(?s)DevCap:.*?(FLReset[+-])`)},
	{"AFCap", regexp.MustCompile(`AFCap:\s*TP[+-] (FLR[+-])`)},
	{"NoSoftRst", regexp.MustCompile(`Status: D\d (NoSoftRst[+-])`)},
	{"ARIFwd", regexp.MustCompile(`(?s)DevCap2:.*?\b(ARIFwd[+-])`)},
	{"ARIForwards", regexp.MustCompile(`(?s)DevCtl2:.*?\b(ARIFwd[+-])`)},
	{"ACSCap", regexp.MustCompile(`ACSCap:\s*(.*)`)},
	{"ACSCtl", regexp.MustCompile(`ACSCtl:\s*(.*)`)},
	{"ARICap", regexp.MustCompile(`ARICap:\s*(.*)`)},
	{"ATSCap", regexp.MustCompile(`ATSCap:\s*(Invalidate Queue Depth: \w+)`)},
	{"ATSCtl", regexp.MustCompile(`ATSCtl:\s*(.*)`)},
	{"PRICtl", regexp.MustCompile(`PRICtl:\s*(Enable[+-])`)},
	{"PRISta", regexp.MustCompile(`PRISta:.*(Stopped[+-])`)},
	{"PRICapacity", regexp.MustCompile(`(Page Request Capacity: .*)`)},
	{"PASIDCap", regexp.MustCompile(`PASIDCap:\s*(.*)`)},
	{"PASIDCtl", regexp.MustCompile(`PASIDCtl:\s*(Enable[+-])`)},
	{"IOVCap", regexp.MustCompile(`(IOVCap):`)},
	{"IOVCtl", regexp.MustCompile(`IOVCtl:\s*(Enable[+-]).* (ARIHierarchy[+-])`)},
	{"IOVCount", regexp.MustCompile(`(Initial VFs: .*)`)},
	{"IOVOffset", regexp.MustCompile(`(VF offset: .*)`)},
	{"IOVPages", regexp.MustCompile(`(Supported Page Size: \w+)`)},
}

// typeNames are lspci's, where they are not the specification's.
var typeNames = map[string]string{
	"Endpoint": "endpoint", "Legacy Endpoint": "legacy endpoint", "Root Port": "root port",
	"Upstream Port":   "upstream port",
	"Downstream Port": "downstream port", "PCI-Express to PCI/PCI-X Bridge": "PCIe-to-PCI bridge",
	"PCI/PCI-X to PCI-Express Bridge":       "PCI-to-PCIe bridge",
	"Root Complex Integrated Endpoint":      "root complex integrated endpoint",
	"Root Complex Event Collector":          "root complex event collector",
	"Root Port (Slot+)":                     "root port",
	"Root Complex Event Collector Endpoint": "root complex event collector",
}

func lines(block string) map[string]string {
	out := map[string]string{}
	for _, p := range told {
		m := p.pattern.FindStringSubmatch(block)
		if m == nil {
			continue
		}
		out[p.key] = strings.TrimSpace(strings.Join(m[1:], " "))
		if p.key == "type" {
			if name, ok := typeNames[out[p.key]]; ok {
				out[p.key] = name
			}
		}
	}
	return out
}

func sign(name string, on bool) string {
	if on {
		return name + "+"
	}
	return name + "-"
}

func services(f iommu.ACSFlags) string {
	var out []string
	for i, name := range []string{"SrcValid", "TransBlk", "ReqRedir", "CmpltRedir", "UpstreamFwd", "EgressCtrl",
		"DirectTrans"} {
		out = append(out, sign(name, f&(1<<i) != 0))
	}
	return strings.Join(out, " ")
}

// describe puts what viaduct has read into lspci's words.
func describe(f *iommu.Function) map[string]string {
	out := map[string]string{}
	if x := f.Express; x != nil {
		out["type"] = x.Type.String()
		// lspci tells it of endpoints alone.
		if x.Type == iommu.Endpoint || x.Type == iommu.LegacyEndpoint || x.Type == iommu.IntegratedEndpoint {
			out["FLReset"] = sign("FLReset", x.FunctionReset)
		}
	}

	if f.AF != nil {
		out["AFCap"] = sign("FLR", f.AF.FunctionReset)
	}
	if f.Power != nil {
		out["NoSoftRst"] = sign("NoSoftRst", !f.Power.SoftReset)
	}
	if x := f.Express; x != nil && (x.Type == iommu.RootPort || x.Type == iommu.DownstreamPort) {
		out["ARIFwd"], out["ARIForwards"] = sign("ARIFwd", x.ARIForwarding), sign("ARIFwd", x.ARIForwards)
	}
	if f.ACS != nil {
		out["ACSCap"], out["ACSCtl"] = services(f.ACS.Capability), services(f.ACS.Control)
	}
	if a := f.ARI; a != nil {
		out["ARICap"] = fmt.Sprintf("%s %s, Next Function: %d", sign("MFVC", a.FunctionGroups),
			sign("ACS", a.ACSGroups), a.Next)
	}

	if a := f.ATS; a != nil {
		out["ATSCap"] = fmt.Sprintf("Invalidate Queue Depth: %02x", a.QueueDepth%32)
		out["ATSCtl"] = fmt.Sprintf("%s, Smallest Translation Unit: %02x", sign("Enable", a.Enabled), a.SmallestTU)
	}

	if p := f.PRI; p != nil {
		out["PRICtl"], out["PRISta"] = sign("Enable", p.Enabled), sign("Stopped", p.Stopped)
		out["PRICapacity"] = fmt.Sprintf("Page Request Capacity: %08x, Page Request Allocation: %08x", p.Capacity,
			p.Allocation)
	}

	if p := f.PASID; p != nil {
		out["PASIDCap"] = fmt.Sprintf("%s %s, Max PASID Width: %02x", sign("Exec", p.Execute),
			sign("Priv", p.Privileged), p.Width)
		out["PASIDCtl"] = sign("Enable", p.Enabled)
	}

	if s := f.SRIOV; s != nil {
		out["IOVCap"] = "IOVCap"
		out["IOVCtl"] = sign("Enable", s.Enabled) + " " + sign("ARIHierarchy", s.ARI)
		out["IOVCount"] = fmt.Sprintf("Initial VFs: %d, Total VFs: %d, Number of VFs: %d, Function Dependency Link: "+
			"%02x",
			s.Initial, s.Total, s.VFs, s.Dependency)
		out["IOVOffset"] = fmt.Sprintf("VF offset: %d, stride: %d, Device ID: %04x", s.Offset, s.Stride, s.VFDevice)
		out["IOVPages"] = fmt.Sprintf("Supported Page Size: %08x", s.PageSizes)
	}

	return out
}
