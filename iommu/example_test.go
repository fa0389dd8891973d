package iommu_test

import (
	"fmt"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// Open with "" is this machine; this is a host that was captured.
func ExampleScan() {
	captured, remove := hosttest.LabFolder()
	defer remove()
	h, err := iommu.Open(captured)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer h.Close()
	t, err := iommu.Scan(h)
	if err != nil {
		fmt.Println(err)
		return
	}

	for _, g := range t.Groups {
		if len(g.Devices) < 2 {
			continue
		}
		fmt.Printf("group %d (%s):", g.ID, g.Type)
		for _, d := range g.Devices {
			fmt.Printf(" %s on %q", d.Name, d.Driver)
		}
		fmt.Println()
	}
	// Output:
	// group 7 (DMA): 0000:00:08.0 on "" 0000:07:01.0 on "e1000" 0000:07:02.0 on ""
	// group 10 (DMA): 0000:00:1f.0 on "" 0000:00:1f.3 on "i801_smbus"
	// group 14 (DMA): 0000:04:00.0 on "pcieport" 0000:05:00.0 on ""
	// group 15 (DMA): 0000:04:01.0 on "pcieport" 0000:06:00.0 on ""
	// group 16 (DMA): 0000:08:00.0 on "" 0000:08:00.1 on ""
}

func ExampleParseSelector() {
	for _, text := range []string{"01:00.0", "01:00.0/vf3", "8086:10c9", "mac=nonsense"} {
		s, err := iommu.ParseSelector(text)
		fmt.Println(s, err)
	}
	// Output:
	// 01:00.0 <nil>
	// 01:00.0/vf3 <nil>
	// 8086:10c9 <nil>
	//  "mac=nonsense" is not a selector: want mac= and six pairs of hexadecimal digits, e.g. mac=52:54:00:12:34:56
}
