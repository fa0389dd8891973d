package guest

import (
	"strings"
	"testing"
)

func TestMemoryOf(t *testing.T) {
	for line, want := range map[string]uint64{
		"qemu-system-x86_64 -m 4G -smp 2":                  4 << 30,
		"qemu-system-x86_64 -m 512":                        512 << 20,
		"qemu-system-x86_64 -m size=8388608k,slots=16":     8 << 30,
		"cloud-hypervisor --memory size=4096M,shared=on":   4 << 30,
		"cloud-hypervisor --memory=size=1G":                1 << 30,
		"crosvm run --mem 2048":                            2 << 30,
		"qemu-system-x86_64 -m":                            0,
		"qemu-system-x86_64 -m slots=16":                   0,
		"qemu-system-x86_64 -m 99999999999999999999G":      0,
		"qemu-system-x86_64 -m 18446744073709551615T":      0,
		"qemu-system-x86_64 -machine q35,memory-backend=m": 0,
		"": 0,
	} {
		if got := MemoryOf(strings.Fields(line)); got != want {
			t.Errorf("%s: %d, want %d", line, got, want)
		}
	}
}
