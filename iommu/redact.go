package iommu

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/internal/bootloader"
)

// redactor masks what tells one host from all others of its kind: addresses of network interfaces, serial numbers and
// GUIDs, each always by the same words, so that what names a device by one still does; and what of the kernel's command
// line is not about devices. What it has no use for is dropped: comments of host.yaml, the log of changes.
type redactor struct {
	numbers map[string]string // what is masked, in lower case
	serials []string          // the longest first
	dropped []string          // files of boot loaders, with root devices and more on command lines
}

// newRedactor collects the serial numbers of a host, which have no form of their own to be found by.
func newRedactor(h *Host, t *Topology) *redactor {
	r := &redactor{numbers: map[string]string{}, dropped: bootloader.Files(h.Host)}
	t.All(func(d *Device) bool {
		if !d.PCI {
			return true
		}
		if serial, err := serialOf(h, d); err == nil {
			r.serial(serial)
		}
		if serial, err := nvmeSerial(h, d.Address); err == nil {
			r.serial(serial)
		}
		return true
	})
	slices.SortFunc(r.serials, func(a, b string) int { return len(b) - len(a) })
	return r
}

func (r *redactor) serial(s string) {
	// A shorter one would be found in words that are none.
	const least = 4
	if key := strings.ToLower(s); len(s) >= least && r.numbers[key] == "" {
		n := len(r.serials) + 1
		r.numbers[key] = fmt.Sprintf("SERIAL%d", n)
		if isHexList(s, "-", 8) {
			r.numbers[key] = fmt.Sprintf("00-00-00-00-00-00-%02x-%02x", n>>8&0xff, n&0xff)
		}
		r.serials = append(r.serials, s)
	}
}

// file is the content of a file of the host, masked; nil if it is left out.
func (r *redactor) file(name string, content []byte) []byte {
	switch base := path.Base(name); {
	case base == "config":
		return r.config(content)
	case name == "proc/cmdline":
		return r.commandLine(content)
	case base == "log.jsonl" || len(content) > 0 && slices.Contains(r.dropped, name):
		return nil
	case name == kernelLines:
		content = withoutLines(content, func(line string) bool { return strings.Contains(line, "ommand line") })
	case bytes.IndexByte(content, 0) >= 0:
		// Tables of the firmware, which name no one host.
		return content
	case strings.HasSuffix(name, ".yaml"):
		comment := func(line string) bool { return strings.HasPrefix(strings.TrimSpace(line), "#") }
		content = withoutLines(content, comment)
	}
	return []byte(r.text(string(content)))
}

// config is config space without the device's serial number.
func (r *redactor) config(content []byte) []byte {
	serial := serialNumber(bytes.NewReader(content))
	if serial == "" {
		return content
	}
	r.serial(serial)
	out := bytes.Clone(content)
	var masked uint64
	for part := range strings.SplitSeq(r.numbers[strings.ToLower(serial)], "-") {
		b, _ := strconv.ParseUint(part, 16, 8)
		masked = masked<<8 | b
	}
	list, _ := extendedCapabilities(bytes.NewReader(content), 0x0003)
	binary.LittleEndian.PutUint64(out[offsetOf(list, 0x0003)+4:], masked)
	return out
}

// kept are the beginnings of words of the kernel's command line that say something of devices.
var kept = []string{
	"acpi", "iommu", "intel_iommu", "amd_iommu", "arm-smmu", "vfio", "pci", "pcie", "pcie_acs_override",
	"modprobe.blacklist", "module_blacklist",
	"initcall_blacklist", "video", "nomodeset", "efi", "hugepages", "hugepagesz", "default_hugepagesz", "kvm",
	"rd.driver", "vfio-pci", "vfio_pci", "lockdown", "noiommu", "nointremap", "intremap", "swiotlb",
}

// commandLine keeps what of a kernel's command line is about devices.
func (r *redactor) commandLine(content []byte) []byte {
	var out []string
	for word := range strings.FieldsSeq(string(content)) {
		key, _, _ := strings.Cut(word, "=")
		module, _, _ := strings.Cut(key, ".")
		if slices.Contains(kept, key) || slices.Contains(kept, module) {
			out = append(out, r.text(word))
		}
	}
	return []byte(strings.Join(out, " ") + "\n")
}

// withoutLines is a text without such lines.
func withoutLines(content []byte, such func(string) bool) []byte {
	var out []byte
	for line := range bytes.Lines(content) {
		if !such(string(line)) {
			out = append(out, line...)
		}
	}
	return out
}

// text masks serial numbers that are known, and all that has the form of a MAC address or GUID.
func (r *redactor) text(s string) string {
	for _, serial := range r.serials {
		s = replaceFold(s, serial, r.numbers[strings.ToLower(serial)])
	}
	var out strings.Builder
	for i := 0; i < len(s); {
		n := 0
		// The longest form first; what goes on behind is none of these.
		for _, pairs := range []int{20, 8, 6} {
			length := 3*pairs - 1
			if i+length <= len(s) && isHexList(s[i:i+length], ":", pairs) && !partOfWord(s, i, i+length) {
				n = length
				break
			}
		}
		if n == 0 {
			out.WriteByte(s[i])
			i++
			continue
		}
		out.WriteString(r.address(strings.ToLower(s[i : i+n])))
		i += n
	}
	return out.String()
}

// partOfWord reports whether what is from..to of a text goes on before or behind.
func partOfWord(s string, from, to int) bool {
	part := func(c byte) bool { return strings.IndexByte(":0123456789abcdefABCDEF", c) >= 0 }
	return from > 0 && part(s[from-1]) || to < len(s) && part(s[to])
}

// address is what masks a MAC address or GUID: one of the locally administered addresses, by number. None is left none.
func (r *redactor) address(s string) string {
	if strings.Trim(s, "0:") == "" || strings.Trim(s, "f:") == "" {
		return s
	}
	if r.numbers[s] == "" {
		n := len(r.numbers) + 1
		zeros := strings.Repeat("00:", (len(s)+1)/3-3)
		r.numbers[s] = fmt.Sprintf("02:%s%02x:%02x", zeros, n>>8&0xff, n&0xff)
	}
	return r.numbers[s]
}

// isHexList reports whether a text is so many pairs of hexadecimal digits.
func isHexList(s, separator string, pairs int) bool {
	parts := strings.Split(s, separator)
	for _, p := range parts {
		if len(p) != 2 || strings.Trim(strings.ToLower(p), "0123456789abcdef") != "" {
			return false
		}
	}
	return len(parts) == pairs
}

// replaceFold replaces a text whatever its case.
func replaceFold(s, old, masked string) string {
	lower, key := strings.ToLower(s), strings.ToLower(old)
	if len(lower) != len(s) {
		// Of a script whose letters have other lengths in lower case.
		return strings.ReplaceAll(s, old, masked)
	}
	var out strings.Builder
	for {
		i := strings.Index(lower, key)
		if i < 0 {
			return out.String() + s
		}
		out.WriteString(s[:i] + masked)
		s, lower = s[i+len(key):], lower[i+len(key):]
	}
}
