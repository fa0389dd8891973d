// Command take takes a device, and all that shares its IOMMU group, for VFIO, and gives it back:
//
//	take DEVICE [HOST]
package main

import (
	"context"
	"fmt"
	"os"

	"viaduct/iommu"
	"viaduct/vfio/bind"
)

func main() {
	if bind.ServeWrites() {
		return
	}
	args := append(os.Args[1:], "", "")
	if err := run(args[0], args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "take:", err)
		os.Exit(1)
	}
}

func run(device, host string) error {
	address, err := iommu.ParseAddress(device)
	if err != nil {
		return err
	}
	h, err := iommu.Open(host)
	if err != nil {
		return err
	}
	defer h.Close()
	b, err := bind.Open(h, bind.Options{})
	if err != nil {
		return err
	}
	defer b.Close()

	for _, goal := range []bind.Goal{bind.Take(bind.Auto), bind.GiveBack()} {
		results, err := b.Move(context.Background(), goal, address)
		for _, r := range results {
			fmt.Println(r.Device, r.Steps)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
