package migrate

import (
	"cmp"
	"slices"
	"strings"

	"viaduct/cmd/internal/vmm"
)

// seen are the CPU flags, by their names in /proc/cpuinfo, that programs and kernels of guests look at and use: one
// that is gone after a move ends a guest that uses it.
var seen = []string{
	"fpu", "sse", "sse2", "pni", "ssse3", "sse4_1", "sse4_2", "sse4a", "popcnt", "abm", "cx16", "lahf_lm", "movbe",
	"aes",
	"pclmulqdq", "rdrand", "rdseed", "adx", "sha_ni", "xsave", "xsaveopt", "xsavec", "xgetbv1", "xsaves", "avx", "avx2",
	"f16c", "fma", "fma4", "xop", "tbm", "bmi1", "bmi2", "fsgsbase", "erms", "fsrm", "smep", "smap", "umip", "pku",
	"la57",
	"pcid", "invpcid", "pdpe1gb", "rdtscp", "x2apic", "tsc_deadline_timer", "misalignsse", "3dnowprefetch", "clflush",
	"clflushopt", "clwb", "clzero", "rdpid", "gfni", "vaes", "vpclmulqdq", "avx512f", "avx512dq", "avx512ifma",
	"avx512cd", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg",
	"avx512_vpopcntdq", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "hle", "rtm",
	"mpx",
	"movdiri", "movdir64b", "serialize", "waitpkg", "wbnoinvd", "succor", "perfctr_core", "topoext",
}

// inQEMU are the flags whose names QEMU has otherwise, beside _ and - (target/i386/cpu.c).
var inQEMU = map[string]string{"pni": "sse3", "sha_ni": "sha-ni", "abm": "abm", "tsc_deadline_timer": "tsc-deadline"}

// baseline is a model that a guest could have on both hosts, by the levels of the x86-64 ABI.
func baseline(a, b *CPU) string {
	both := func(flags ...string) bool {
		return !slices.ContainsFunc(flags, func(f string) bool {
			return !slices.Contains(a.Flags, f) || !slices.Contains(b.Flags, f)
		})
	}
	model := "qemu64"
	if both("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3") {
		model = "Nehalem"
	}
	if model == "Nehalem" && both("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave", "invpcid",
		"pcid") {
		model = "Haswell-noTSX"
	}
	if a.Vendor != b.Vendor {
		model += ",vendor=" + a.Vendor
	}
	return model
}

// missing are the flags that guests see which a CPU has and another has not.
func missing(a, b *CPU) []string {
	var out []string
	for _, f := range seen {
		if slices.Contains(a.Flags, f) && !slices.Contains(b.Flags, f) {
			out = append(out, f)
		}
	}
	return out
}

// emulated reports whether the guest's CPU is emulated, so that the hosts' do not matter.
func (m *move) emulated() bool { return m.guest.VM != nil && m.guest.VM.Accel == "tcg" }

// words reports whether the words that the guest was started with are known.
func (m *move) words() bool { return m.guest.VM != nil && m.guest.VM.Words }

// x86 reports whether the hosts have CPUs of this kind, of which the checks of CPUs are.
func (m *move) x86() bool { return m.from.Arch == "" || m.from.Arch == "x86_64" }

// cpus are both CPUs; a line if they need not or cannot be compared.
func (m *move) cpus() (a, b *CPU, line *Line) {
	switch {
	case !m.x86():
		return nil, nil, &Line{}
	case m.emulated():
		l := ok(inWords, "the guest's CPU is emulated")
		return nil, nil, &l
	case m.from.CPU == nil || m.to.CPU == nil:
		l := unknown(inCPUInfo, "the CPUs of both hosts are not known (a snapshot of this viaduct has them)")
		return nil, nil, &l
	}
	return m.from.CPU, m.to.CPU, nil
}

// vendor is the maker's name that the guest sees: that of the host, unless the guest was started with another.
func (m *move) vendor(of *CPU) string {
	if m.words() {
		if fixed := m.guest.VM.Property("vendor"); fixed != "" {
			return fixed
		}
	}
	return of.Vendor
}

func checkVendor(m *move) Line {
	a, b, line := m.cpus()
	switch {
	case line != nil:
		return *line
	case a.Vendor == b.Vendor:
		return ok(inCPUInfo, "both are %s", a.Vendor)
	case !m.words():
		return unknown(inWords, "%s is %s and %s is %s; what CPU the guest was started with is not known", m.from.Host,
			a.Vendor, m.to.Host, b.Vendor)
	case m.guest.VM.LikeHost():
		return refuse(inCPUInfo+", "+inWords, "%s is %s and %s is %s, and the guest's CPU is the host's: nobody can "+
			"promise "+
			"that it goes on; choose -cpu %s when it is started next", m.from.Host, a.Vendor, m.to.Host, b.Vendor,
			baseline(a, b))
	case m.guest.VM.Property("vendor") == "":
		return refuse(inCPUInfo+", "+inWords, "%s is %s and %s is %s, and KVM shows the guest the host's maker: "+
			"choose -cpu %s when it is started next", m.from.Host, a.Vendor, m.to.Host, b.Vendor, baseline(a, b))
	}
	return warn(inCPUInfo+", "+inWords, "%s is %s and %s is %s; the guest sees %s on both. SYSENTER and SYSCALL of "+
		"32-bit programs, and the other maker's hypercall instruction, are emulated", m.from.Host, a.Vendor, m.to.Host,
		b.Vendor, m.vendor(a))
}

func checkModel(m *move) Line {
	a, b, line := m.cpus()
	switch {
	case line != nil:
		return *line
	case !m.words():
		return unknown(inWords, "what CPU the guest was started with is not known (viaduct run keeps it)")
	case !m.guest.VM.LikeHost():
		name, _ := m.guest.VM.Model()
		return ok(inWords, "the guest's CPU is the model %s, whatever the host's is", cmp.Or(name, "that QEMU has by "+
			"itself"))
	case a.Vendor == b.Vendor && a.Family == b.Family && a.Model == b.Model:
		return warn(inWords, "the guest's CPU is the host's; both are %s, but microcode and KVM decide what it has: "+
			"choose -cpu %s when it is started next", a.Name, baseline(a, b))
	}
	return refuse(inWords+", "+inCPUInfo, "the guest's CPU is the host's, and %s is not %s: choose -cpu %s when it is "+
		"started next", cmp.Or(b.Name, "the other"), cmp.Or(a.Name, "this"), baseline(a, b))
}

func checkFlags(m *move) Line {
	a, b, line := m.cpus()
	if line != nil {
		return *line
	}

	gone := missing(a, b)
	if len(gone) == 0 {
		return ok(inCPUInfo, "%s has every feature that the guest can use of %s's CPU", m.to.Host, m.from.Host)
	}

	var named []string
	if m.words() {
		if m.guest.VM.LikeHost() {
			named = gone
		}
		for _, f := range gone {
			if flagOf(m.guest.VM, f) == "on" && !slices.Contains(named, f) {
				named = append(named, f)
			}
		}
	}

	switch {
	case m.to.QEMU != nil && m.to.QEMU.Refused == "":
		return ok(inQMP, "%s lacks %s, and the guest's model does not need it", m.to.Host, strings.Join(gone, " "))
	case len(named) > 0:
		return refuse(inCPUInfo+", "+inWords, "%s lacks %s, which the guest has: choose -cpu %s when it is started "+
			"next",
			m.to.Host, strings.Join(named, " "), baseline(a, b))
	}

	return unknown(inCPUInfo, "%s lacks %s; whether the guest's model has that is for QEMU to say (--to a running "+
		"host)",
		m.to.Host, strings.Join(gone, " "))
}

// flagOf is how the CPU's words set a flag of /proc/cpuinfo: QEMU has its own names for some, and dashes.
func flagOf(m *vmm.Machine, name string) string {
	for _, n := range []string{name, strings.ReplaceAll(name, "_", "-"), strings.ReplaceAll(name, "_", "."),
		inQEMU[name]} {
		if n == "" {
			continue
		}
		if v := m.Property(n); v != "" {
			return v
		}
	}
	return ""
}

// checkMitigations tells what the guest's kernel chose when it booted and keeps.
func checkMitigations(m *move) Line {
	a, b, line := m.cpus()
	if line != nil || a.Vendor == b.Vendor {
		return Line{}
	}
	if m.vendor(a) == "AuthenticAMD" && b.Vendor == "GenuineIntel" {
		return warn(inCPUInfo, "the guest's kernel chose its mitigations for an AMD CPU (no page table isolation, "+
			"against Meltdown), and keeps them on an Intel one until it is booted again")
	}
	return warn(inCPUInfo, "the guest's kernel chose its mitigations for the other maker's CPU, and keeps them until "+
		"it is booted again")
}

// scales reports whether KVM can give guests another TSC frequency than the host's.
func (c *CPU) scales() bool {
	return slices.Contains(c.Flags, "tsc_scale") || slices.Contains(c.VMXFlags, "tsc_scaling")
}

func checkTSC(m *move) Line {
	a, b, line := m.cpus()
	if line != nil {
		return *line
	}
	invariant := m.words() && m.guest.VM.Property("invtsc") == "on"
	fixed := m.words() && m.guest.VM.Property("tsc-frequency") != ""
	switch {
	case invariant && !fixed:
		return refuse(inWords, "the guest was promised an invariant TSC (invtsc) without tsc-frequency=, which QEMU "+
			"does not move")
	case b.scales():
		return ok(inCPUInfo, "%s can give the guest the TSC frequency it has", m.to.Host)
	case invariant:
		return refuse(inCPUInfo+", "+inWords, "%s cannot scale the TSC, and the guest was promised an invariant one",
			m.to.Host)
	case a.Name == b.Name && a.Name != "":
		return ok(inCPUInfo, "%s cannot scale the TSC, and both CPUs are %s", m.to.Host, a.Name)
	}
	return warn(inCPUInfo, "%s cannot scale the TSC: where its frequency is another one, the guest's clock may go "+
		"wrong if it is its clock source", m.to.Host)
}

func checkNested(m *move) Line {
	a, b, line := m.cpus()
	if line != nil {
		return *line
	}
	if !m.words() {
		return unknown(inWords, "whether the guest can be a host itself is not known")
	}
	asked := m.guest.VM.Property("vmx") == "on" || m.guest.VM.Property("svm") == "on"
	const where = "sys/module/kvm_*/parameters/nested, " + inWords
	switch {
	case !asked && !m.guest.VM.LikeHost():
		return ok(inWords, "the guest's model does not ask for nested virtualization")
	case !asked && m.from.Nested == nil:
		return unknown(where, "whether KVM on %s lets guests be hosts is not known", m.from.Host)
	case !asked && !*m.from.Nested:
		return ok(where, "KVM on %s does not let guests be hosts", m.from.Host)
	case a.Vendor != b.Vendor:
		return refuse(where, "the guest can be a host itself, and VMX and SVM are not the same on %s", m.to.Host)
	case m.to.Nested != nil && !*m.to.Nested:
		return refuse(where, "the guest can be a host itself, and KVM on %s does not let it (nested=1)", m.to.Host)
	}
	return warn(where, "the guest can be a host itself: while it runs guests itself, its move may fail")
}

// checkPKRU names the state that leaked into guests before Linux 5.17 (commit ad856280ddea, "x86/kvm/fpu: Limit guest
// user_xfeatures to supported bits of XCR0"): it ends a guest on a CPU without it, or under a kernel that refuses it.
func checkPKRU(m *move) Line {
	a, b, line := m.cpus()
	switch {
	case line != nil:
		return *line
	case release(m.from.Kernel) == nil:
		return unknown(inRelease, "the kernel of %s is not known", m.from.Host)
	case atLeast(m.from.Kernel, 5, 17) || !slices.Contains(a.Flags, "pku"):
		return ok(inRelease+", "+inCPUInfo, "no state of protection keys leaks into guests on %s", m.from.Host)
	case m.words() && m.guest.VM.LikeHost() && slices.Contains(b.Flags, "pku"):
		return ok(inRelease+", "+inCPUInfo, "the guest has protection keys, and %s has them", m.to.Host)
	case atLeast(m.to.Kernel, 5, 17) || !slices.Contains(b.Flags, "pku"):
		return warn(inRelease+", "+inCPUInfo, "Linux %s lets state of protection keys into guests that have none, "+
			"with which a guest may spin or stop on %s (5.17 fixes it, unless that was backported)",
			m.from.Kernel, m.to.Host)
	}
	return ok(inRelease+", "+inCPUInfo, "both hosts treat protection keys alike")
}
