package main

import (
	"flag"
	"fmt"
	"io"
	"os"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/dra"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
)

// cdiCommand writes the specifications of all pools, by the numbers that IOMMU groups have in this boot.
func cdiCommand(args []string, stderr io.Writer) error {
	var o common
	f := flag.NewFlagSet("cdi", flag.ContinueOnError)
	o.flags(f)
	if err := parseOnly(f, args, stderr); err != nil {
		return err
	}
	h, err := iommu.Open("")
	if err != nil {
		return err
	}
	defer h.Close()
	return writeCDI(h, &o, stderr)
}

func writeCDI(h *iommu.Host, o *common, stderr io.Writer) error {
	if err := os.MkdirAll(o.cdiDir, 0o755); err != nil {
		return err
	}
	books, err := lease.Open(h, lease.Options{Tell: func(note string) { fmt.Fprintln(stderr, "viaduct-kube:", note) }})
	if err != nil {
		return err
	}
	defer books.Close()
	facts, err := node.Read(h, books)
	if err != nil {
		return err
	}
	for _, unseen := range facts.Unseen() {
		fmt.Fprintln(stderr, "viaduct-kube:", unseen)
	}
	return node.WritePools(o.cdiDir, o.driver, node.Functions(facts, dra.Ours(o.driver)), facts.Nodes)
}
