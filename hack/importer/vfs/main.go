// Command vfs gives a network card two VFs, each with an address and a VLAN, and removes them again:
//
//	vfs PF [HOST]
package main

import (
	"context"
	"fmt"
	"os"

	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

func main() {
	if bind.ServeWrites() {
		return
	}
	args := append(os.Args[1:], "", "")
	if err := run(args[0], args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "vfs:", err)
		os.Exit(1)
	}
}

func run(device, host string) error {
	pf, err := iommu.ParseAddress(device)
	if err != nil {
		return err
	}
	h, err := iommu.Open(host)
	if err != nil {
		return err
	}
	defer h.Close()
	s, err := sriov.Open(h, bind.Options{})
	if err != nil {
		return err
	}
	defer s.Close()

	vf := sriov.VFWish{Use: sriov.UseVFIO, Settings: sriov.Settings{sriov.MAC: sriov.StableMAC, sriov.VLAN: "100"}}
	plan, err := s.Make(context.Background(), pf, sriov.Wish{VFs: sriov.Repeat(2, vf)})
	if err != nil {
		return err
	}
	for _, line := range append(bind.Commands(plan.Steps()), plan.Notes...) {
		fmt.Println(line)
	}
	_, err = s.Make(context.Background(), pf, sriov.Wish{})
	return err
}
