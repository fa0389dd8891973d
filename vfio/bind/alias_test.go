package bind

import (
	"slices"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
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

// The aliases of the variant drivers as Linux 7.2 builds them (their ids: drivers/vfio/pci/*/), one of them built in.
const variants = `alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
alias vfio_pci:v00008086d0000B080sv*sd*bc03sc*i* xe_vfio_pci
alias vfio_pci:v00008086d00004941sv*sd*bc*sc*i* qat_vfio_pci
alias vfio_pci:v00001AF4d00001041sv*sd*bc*sc*i* virtio_vfio_pci
alias vfio_pci:v00001AF4d00001042sv*sd*bc*sc*i* virtio_vfio_pci
alias pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_core
`

const builtin = "vfio_pci_core.license=GPL\x00nvgrace_gpu_vfio_pci.alias=vfio_pci:v000010DEd00002342sv*sd*bc*sc*i*\x00nvgrace_gpu_vfio_pci.author=x\x00"

func TestVariants(t *testing.T) {
	const modules, module = "lib/modules/7.2.0/", "sys/module/"
	base := hosttest.Tree{
		"proc/sys/kernel/osrelease": "7.2.0\n", modules + "modules.alias": variants,
		modules + "modules.builtin.modinfo": builtin,
	}
	for m, driver := range map[string]string{
		"mlx5_vfio_pci": "mlx5_vfio_pci", "xe_vfio_pci": "xe-vfio-pci", "qat_vfio_pci": "qat_vfio_pci",
		"virtio_vfio_pci": "virtio_vfio_pci", "nvgrace_gpu_vfio_pci": "nvgrace_gpu_vfio_pci", "vfio_pci": "vfio-pci",
	} {
		base[module+m+"/drivers/pci:"+driver+"/uevent"] = ""
	}
	for what, c := range map[string]struct{ modalias, driver string }{
		"ConnectX VF":               {"v000015B3d0000101Esv000015B3sd00000051bc02sc00i00", "mlx5_vfio_pci"},
		"ConnectX PF":               {"v000015B3d00001021sv000015B3sd00000051bc02sc00i00", "vfio-pci"},
		"Panther Lake GPU":          {"v00008086d0000B080sv00001028sd00000D1Fbc03sc00i00", "xe-vfio-pci"},
		"its function of no GPU":    {"v00008086d0000B080sv00001028sd00000D1Fbc04sc03i00", "vfio-pci"},
		"its audio":                 {"v00008086d0000E428sv00001028sd00000D1Fbc04sc03i80", "vfio-pci"},
		"QAT VF":                    {"v00008086d00004941sv00008086sd00000000bc0Bsc40i00", "qat_vfio_pci"},
		"virtio-net":                {"v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00", "virtio_vfio_pci"},
		"virtio-blk":                {"v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00", "virtio_vfio_pci"},
		"virtio-gpu":                {"v00001AF4d00001050sv00001AF4sd00001100bc03sc80i00", "vfio-pci"},
		"Grace Hopper GPU built in": {"v000010DEd00002342sv000010DEsd000016EBbc03sc02i00", "nvgrace_gpu_vfio_pci"},
		"an NVIDIA GPU's audio":     {"v000010DEd000022BAsv000010DEsd000016EBbc04sc03i00", "vfio-pci"},
	} {
		k := hosttest.NewKernel(t, base)
		k.Register("vfio-pci")
		b := open(t, k, Options{})
		id, err := iommu.ParseModalias("pci:" + c.modalias)
		if err != nil || id.Modalias() != "pci:"+c.modalias {
			t.Errorf("%s: %v, %s", what, err, id.Modalias())
		}
		change, err := b.Plan(&iommu.Device{Name: igb, PCI: true, ID: id}, Take(Auto))
		if err != nil || change.To != c.driver || change.Module != "" {
			t.Errorf("%s: %q, module %q, %v, want %q", what, change.To, change.Module, err, c.driver)
		}
	}

	// Who captured a host may not have looked for its kernel's release: then nothing is known of variants.
	captured, err := Open(&iommu.Host{Host: hosttest.Lab(t).With(hosttest.Tree{
		"proc/sys/kernel/osrelease": hosttest.Gone, "sys/bus/pci/drivers/vfio-pci/": "",
	}).Host(t)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer captured.Close()
	change, err := captured.Plan(&iommu.Device{Name: igb, PCI: true}, Take(Auto))
	if err != nil || change.To != "vfio-pci" {
		t.Errorf("without a release: %q, %v", change.To, err)
	}
}

func FuzzMatchModules(f *testing.F) {
	f.Add([]byte(aliases), "pci:v00008086d000010CAsv00001AF4sd00001100bc02sc00i00")
	f.Add([]byte("alias pci:[ x\nalias pci:\\ y\nalias pci:** z"), "pci:")
	f.Add([]byte(builtin), "vfio_pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i00")
	f.Fuzz(func(t *testing.T, file []byte, alias string) {
		for _, text := range [][]byte{file, builtinAliases(file)} {
			seen := map[string]bool{}
			for _, m := range matchModules(text, alias) {
				if m == "" || seen[m] {
					t.Errorf("module %q, before: %v", m, seen)
				}
				seen[m] = true
			}
		}
	})
}
