package main

import (
	"errors"
	"flag"
	"fmt"
	"io"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/manifests"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
)

func manifestsCommand(args []string, stdout, stderr io.Writer) error {
	var o common
	m := manifests.Options{}
	f := flag.NewFlagSet("manifests", flag.ContinueOnError)
	o.flags(f)
	f.StringVar(&m.Namespace, "namespace", "viaduct", "`namespace` of the daemon set")
	f.StringVar(&m.Image, "image", "viaduct-kube:latest", "`image` with viaduct-kube as its entry point")
	var err error
	if m.Pools, err = parse(f, args, stderr); err != nil {
		return err
	}
	m.Driver, m.KubeletDir, m.CDIDir = o.driver, o.kubeletDir, o.cdiDir
	if len(m.Pools) == 0 {
		if m.Pools, err = declaredPools(); err != nil {
			return fmt.Errorf("read the pools of this host: %w (or name them: viaduct-kube manifests POOL...)", err)
		}
	}
	for _, p := range m.Pools {
		if err := node.CheckPool(p); err != nil {
			return usageError{err}
		}
	}
	return manifests.Print(stdout, &m)
}

// declaredPools are the names of the pools of this host.
func declaredPools() ([]string, error) {
	h, err := iommu.Open("")
	if err != nil {
		return nil, err
	}
	defer h.Close()
	books, err := lease.Open(h, lease.Options{})
	if err != nil {
		return nil, err
	}
	defer books.Close()
	var out []string
	for _, p := range books.Pools() {
		if p.Name != "" {
			out = append(out, p.Name)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("host.yaml declares no pool")
	}
	return out, nil
}
