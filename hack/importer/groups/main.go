// Command groups lists the IOMMU groups of this machine, or of a host that viaduct snapshot captured:
//
//	groups [HOST]
package main

import (
	"fmt"
	"os"

	"viaduct/iommu"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "groups:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	h, err := iommu.Open(append(args, "")[0])
	if err != nil {
		return err
	}
	defer h.Close()
	t, err := iommu.Scan(h)
	if err != nil {
		return err
	}

	for _, g := range t.Groups {
		fmt.Printf("group %d (%s)\n", g.ID, g.Type)
		for _, d := range g.Devices {
			fmt.Printf("  %s %04x:%04x on %q\n", d.Name, d.Vendor, d.Device, d.Driver)
		}
	}
	return nil
}
