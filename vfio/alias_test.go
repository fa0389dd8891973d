package vfio

import (
	"slices"
	"testing"
)

const aliases = `# Aliases extracted from modules themselves.
alias pci:v00008086d000010CAsv*sd*bc*sc*i* igbvf
alias pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_core
alias pci:v00001002d*sv*sd*bc03sc*i* amdgpu
alias pci:v00001002d000067DFsv*sd*bc*sc*i* amdgpu
alias pci:v*d*sv*sd*bc01sc06i01* ahci
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
alias usb:v0424pEC00d*dc*dsc*dp*ic*isc*ip*in* smsc95xx
alias broken
`

func TestMatchModules(t *testing.T) {
	for alias, want := range map[string][]string{
		"pci:v00008086d000010CAsv00001AF4sd00001100bc02sc00i00":      {"igbvf"},
		"vfio_pci:v00008086d000010CAsv00001AF4sd00001100bc02sc00i00": {"vfio_pci"},
		"vfio_pci:v000015B3d0000101Esv000015B3sd00000000bc02sc00i00": {"mlx5_vfio_pci", "vfio_pci"},
		"pci:v00001002d000067DFsv00001002sd00000000bc03sc00i00":      {"amdgpu"},
		"pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01":      {"ahci"},
		"pci:v00001234d000011E8sv00001AF4sd00001100bc00scFFi00":      nil,
	} {
		if got := matchModules([]byte(aliases), alias); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", alias, got, want)
		}
	}
}

func FuzzMatchModules(f *testing.F) {
	f.Add([]byte(aliases), "pci:v00008086d000010CAsv00001AF4sd00001100bc02sc00i00")
	f.Add([]byte("alias pci:[ x\nalias pci:\\ y\nalias pci:** z"), "pci:")
	f.Fuzz(func(t *testing.T, file []byte, alias string) {
		seen := map[string]bool{}
		for _, m := range matchModules(file, alias) {
			if m == "" || seen[m] {
				t.Errorf("module %q, before: %v", m, seen)
			}
			seen[m] = true
		}
	})
}
