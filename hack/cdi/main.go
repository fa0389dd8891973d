// Command cdi loads a CDI spec with CDI's own library and gives a container what it says, as a container runtime would:
//
//	cdi SPEC DEVICE
//
// It prints the container's device nodes. It is a module of its own, as viaduct itself needs none of this.
package main

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	oci "github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("cdi: ")
	if len(os.Args) != 3 {
		log.Fatal("usage: cdi SPEC DEVICE")
	}
	dir, err := os.MkdirTemp("", "cdi")
	if err != nil {
		log.Fatal(err)
	}
	spec, err := os.ReadFile(os.Args[1])
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "viaduct.json"), spec, 0o644)
	}

	if err != nil {
		log.Fatal(err)
	}
	cache, err := cdi.NewCache(cdi.WithSpecDirs(dir), cdi.WithAutoRefresh(false))
	if err != nil {
		log.Fatal(err)
	}
	if errs := cache.GetErrors(); len(errs) > 0 {
		log.Fatal(errs)
	}

	d := cache.GetDevice(os.Args[2])
	if d == nil {
		log.Fatalf("no device %s; there are %v", os.Args[2], cache.ListDevices())
	}
	for _, n := range d.ContainerEdits.DeviceNodes { // those of the lab are not here
		n.Type, n.Major, n.Minor = "c", 10, 196
	}
	container := &oci.Spec{}
	if err := d.ApplyEdits(container); err != nil {
		log.Fatal(err)
	}

	for _, n := range container.Linux.Devices {
		fmt.Println(n.Path)
	}
	if err := os.RemoveAll(dir); err != nil {
		log.Fatal(err)
	}
}
