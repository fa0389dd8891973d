package vmm

import (
	"strings"
	"testing"
)

func TestReadMachine(t *testing.T) {
	for words, want := range map[string]Machine{
		"-m 4G -cpu host -machine q35,accel=kvm disk.img": {Memory: 4 << 30,
			CPU: "host", Machine: "q35", Accel: "kvm", Words: true},
		"-nodefaults -m 512 " +
			"-enable-kvm": {Memory: 512 << 20, Accel: "kvm",
			Words: true},
		"-m size=2048M,slots=4,maxmem=8G -M type=pc-q35-9.1": {Memory: 2 << 30,
			Machine: "pc-q35-9.1", Words: true},
		"--accel kvm -accel tcg -cpu " +
			"EPYC,vendor=AuthenticAMD": {CPU: "EPYC,vendor=AuthenticAMD",
			Accel: "kvm:tcg", Words: true},
		"-m 99999999999999G -device vfio-pci,host=0000:01:10.0 -name -m -nographic -machine q35": {Machine: "q35",
			Words: true},
	} {
		if got := ReadMachine(strings.Fields(words)); got != want {
			t.Errorf("%s:\n got %+v\nwant %+v", words, got, want)
		}
	}
	m := Machine{CPU: "Nehalem,+avx,-aes,vendor=GenuineIntel,pcid=off,enforce"}
	for name, want := range map[string]string{"avx": "on", "aes": "off", "vendor": "GenuineIntel", "pcid": "off",
		"enforce": "on", "sse": ""} {
		if got := m.Property(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if got := fields("a,,b,c=d,"); strings.Join(got, "|") != "a,b|c=d|" {
		t.Errorf("%q", got)
	}
}
