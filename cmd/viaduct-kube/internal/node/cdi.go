package node

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"viaduct/iommu"
)

// Backend is how a container opens a function.
type Backend string

// The backends. A container never gets both: Kata and some VMMs take two ways to one device for two devices.
const (
	Group   Backend = "group"   // /dev/vfio/vfio and /dev/vfio/N
	IOMMUFD Backend = "iommufd" // /dev/iommu and /dev/vfio/devices/vfioN
)

// ParseBackend reads a backend; "" is the group's, which every VMM knows.
func ParseBackend(s string) (Backend, error) {
	switch b := cmp.Or(Backend(s), Group); b {
	case Group, IOMMUFD:
		return b, nil
	}
	return "", fmt.Errorf("unknown backend %q: want group or iommufd", s)
}

// Pick are those of a function's nodes that a container gets with a backend, and the control node. An error says that
// the function has none of that kind.
func Pick(nodes []string, b Backend) ([]string, error) {
	own := func(n string) bool { return strings.HasPrefix(n, "/dev/vfio/devices/") }
	for _, n := range nodes {
		switch {
		case b == IOMMUFD && own(n):
			return []string{"/dev/iommu", n}, nil
		case b == Group && !own(n) && !strings.Contains(n, "noiommu"):
			return []string{"/dev/vfio/vfio", n}, nil
		}
	}
	return nil, fmt.Errorf("it has no node for the backend %s, only %q", b, nodes)
}

// Spec is a CDI specification, as far as it is used here: container-device-interface, SPEC.md.
type Spec struct {
	Version string   `json:"cdiVersion"`
	Kind    string   `json:"kind"` // VENDOR/CLASS
	Devices []Device `json:"devices"`
}

// Device is a CDI device. Its whole name is KIND=NAME.
type Device struct {
	Name  string `json:"name"`
	Edits Edits  `json:"containerEdits"`
}

// Edits are what a container gets with a device.
type Edits struct {
	Env   []string     `json:"env,omitempty"`
	Nodes []DeviceNode `json:"deviceNodes"`
}

// DeviceNode is a node of the host that a container gets under the same name.
type DeviceNode struct {
	Path        string `json:"path"`
	Permissions string `json:"permissions"`
}

// specVersion is the lowest that has all that is used, and the one that Kata's runtime reads.
const specVersion = "0.5.0"

// NewSpec is a specification without devices.
func NewSpec(kind string) *Spec { return &Spec{Version: specVersion, Kind: kind, Devices: []Device{}} }

// Add adds a device with nodes. Whoever gets it may read and write them, and make no others.
func (s *Spec) Add(name string, nodes []string, env ...string) {
	d := Device{Name: name, Edits: Edits{Env: env}}
	for _, n := range nodes {
		d.Edits.Nodes = append(d.Edits.Nodes, DeviceNode{Path: n, Permissions: "rw"})
	}
	s.Devices = append(s.Devices, d)
}

// Write writes a specification into a folder, whole or not at all: a container runtime may read at any time.
func (s *Spec) Write(dir, name string) error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return WriteFile(filepath.Join(dir, name+".json"), append(text, '\n'))
}

// WriteFile replaces a file, whole or not at all, unless it has that content.
func WriteFile(file string, content []byte) error {
	if old, err := os.ReadFile(file); err == nil && slices.Equal(old, content) {
		return nil
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return nil
}

// Remove removes a specification from a folder. One that is not there is no error.
func Remove(dir, name string) error {
	if err := os.Remove(filepath.Join(dir, name+".json")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// PoolKind is the CDI kind of a pool's functions, and the name of its extended resource: Kata makes the one of the
// other.
func PoolKind(domain, pool string) string { return domain + "/" + pool }

// PoolSpec is the specification of a pool's functions, each by its address. Those that have no node now are left out:
// they get one when they are on a VFIO driver.
func PoolSpec(domain, pool string, functions []Function, nodes map[iommu.Address][]string) *Spec {
	s := NewSpec(PoolKind(domain, pool))
	for i := range functions {
		f := &functions[i]
		if f.Pool != pool || f.Lost {
			continue
		}
		if own, err := Pick(nodes[f.Address], Group); err == nil {
			s.Add(f.Address.String(), own)
		}
	}
	return s
}

// WritePools writes a specification of each pool, and removes those of pools that are no more.
func WritePools(dir, domain string, functions []Function, nodes map[iommu.Address][]string) error {
	prefix := domain + "-pool-"
	kept := map[string]bool{}
	for i := range functions {
		pool := functions[i].Pool
		if pool == "" || kept[pool] {
			continue
		}
		kept[pool] = true
		if err := PoolSpec(domain, pool, functions, nodes).Write(dir, prefix+pool); err != nil {
			return err
		}
	}
	old, err := filepath.Glob(filepath.Join(dir, prefix+"*.json"))
	if err != nil {
		return err
	}
	for _, file := range old {
		pool := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(file), prefix), ".json")
		if !kept[pool] {
			err = errors.Join(err, os.Remove(file))
		}
	}
	return err
}
