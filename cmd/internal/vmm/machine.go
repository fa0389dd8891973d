package vmm

import (
	"slices"
	"strconv"
	"strings"
)

// Machine is a guest's virtual machine, as the words of QEMU's command line have it. What is not known is empty.
type Machine struct {
	Format  string `json:"format,omitempty"`  // the VMM is told of devices in the words of this format
	Memory  uint64 `json:"memory,omitempty"`  // in bytes
	Standby string `json:"standby,omitempty"` // the bridge that the virtio NIC of a failover pair is on
	Socket  string `json:"socket,omitempty"`  // of QEMU's machine protocol
	CPU     string `json:"cpu,omitempty"`     // as -cpu has it
	Machine string `json:"machine,omitempty"` // the type, as -machine has it
	Accel   string `json:"accel,omitempty"`   // kvm, tcg, or several with colons between
	Words   bool   `json:"words,omitempty"`   // the command line is known: what is empty was not said there
}

// Libvirt reports whether libvirt runs the guest; false of what is not known.
func (m *Machine) Libvirt() bool { return m != nil && m.Format == "libvirt" }

// option is one option of QEMU's command line, and its value.
type option struct{ name, value string }

// flagsOnly are options without a value that a guest is started with.
var flagsOnly = []string{
	"nodefaults", "nographic", "no-user-config", "nodefconfig", "S", "enable-kvm", "daemonize", "no-reboot",
	"no-shutdown",
	"snapshot", "no-acpi", "no-hpet", "no-fd-bootchk", "singlestep", "win2k-hack", "usb", "full-screen", "portrait",
	"mem-prealloc", "only-migratable", "preconfig",
}

// options splits words into options; a word that is none, such as a disk image, has no name.
func options(words []string) []option {
	var out []option
	for i := 0; i < len(words); i++ {
		name, isOption := strings.CutPrefix(words[i], "-")
		if !isOption || name == "" {
			out = append(out, option{"", words[i]})
			continue
		}
		o := option{name: strings.TrimPrefix(name, "-")}
		if !slices.Contains(flagsOnly, o.name) && i+1 < len(words) {
			i++
			o.value = words[i]
		}
		out = append(out, o)
	}
	return out
}

// fields splits an option's value at its commas, of which two stand for one.
func fields(value string) []string {
	var out []string
	var b strings.Builder
	for i := 0; i < len(value); i++ {
		switch {
		case value[i] != ',':
			b.WriteByte(value[i])
		case i+1 < len(value) && value[i+1] == ',':
			b.WriteByte(',')
			i++
		default:
			out = append(out, b.String())
			b.Reset()
		}
	}
	return append(out, b.String())
}

// get is a key's value in an option, or what stands first without a key.
func get(value, key string, first bool) string {
	for i, f := range fields(value) {
		k, v, named := strings.Cut(f, "=")
		if named && k == key {
			return v
		}
		if !named && first && i == 0 {
			return f
		}
	}
	return ""
}

// ReadMachine reads of the words of QEMU's command line what a migration has to know.
func ReadMachine(words []string) Machine {
	m := Machine{Words: true}
	for _, o := range options(words) {
		switch o.name {
		case "m", "memory":
			m.Memory = readSize(get(o.value, "size", true))
		case "cpu":
			m.CPU = o.value
		case "machine", "M":
			m.Machine = get(o.value, "type", true)
			if a := get(o.value, "accel", false); a != "" {
				m.Accel = a
			}
		case "accel":
			if a := get(o.value, "accel", true); m.Accel == "" {
				m.Accel = a
			} else {
				m.Accel += ":" + a
			}
		case "enable-kvm":
			m.Accel = "kvm"
		}
	}
	return m
}

// readSize reads a size of QEMU's, in MiB if it has no unit; 0 if it is none.
func readSize(s string) uint64 {
	shift := uint(20)
	if n := len(s); n > 0 {
		if i := strings.IndexByte("BKMGT", s[n-1]&^0x20); i >= 0 {
			s, shift = s[:n-1], uint(10*i)
		}
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n<<shift>>shift != n {
		return 0
	}
	return n << shift
}

// Model is the CPU's model, and the properties that it is given.
func (m *Machine) Model() (name string, properties []string) {
	all := fields(m.CPU)
	return all[0], all[1:]
}

// Property is how the CPU's words set a property: "" if they do not.
func (m *Machine) Property(name string) string {
	_, all := m.Model()
	out := ""
	for _, p := range all {
		switch k, v, named := strings.Cut(p, "="); {
		case named && k == name:
			out = v
		case p == name, p == "+"+name:
			out = "on"
		case p == "-"+name:
			out = "off"
		}
	}
	return out
}

// LikeHost reports whether the guest's CPU is whatever the host's is.
func (m *Machine) LikeHost() bool {
	name, _ := m.Model()
	return name == "host" || name == "max"
}
