// Package config is what a claim or a device class may say of a function.
package config

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"sigs.k8s.io/json"

	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/sriov"
)

// Device is what a claim or a device class may say of a function, as opaque parameters of the driver.
type Device struct {
	APIVersion string `json:"apiVersion"` // viaduct.dev/v1
	Kind       string `json:"kind"`       // DeviceConfig
	// MAC is a VF's address, or stable for one that is made of the PF's and the VF's index.
	MAC string `json:"mac,omitempty"`
	// VLAN is that which the PF tags a VF's frames with.
	VLAN *int `json:"vlan,omitempty"`
	// Settings are other settings of a VF, as viaduct vf set takes them.
	Settings map[string]string `json:"settings,omitempty"`
	// Backend is group or iommufd.
	Backend string `json:"backend,omitempty"`
}

// The version and kind of a Device.
const (
	Version = "viaduct.dev/v1"
	Kind    = "DeviceConfig"
)

// Parse reads opaque parameters. What is not known in them is an error.
func Parse(raw []byte) (*Device, error) {
	c := &Device{}
	strict, err := json.UnmarshalStrict(raw, c)
	if err := errors.Join(append(strict, err)...); err != nil {
		return nil, fmt.Errorf("read the device configuration: %w", err)
	}
	if c.APIVersion != Version || c.Kind != Kind {
		return nil, fmt.Errorf("the device configuration is %s, %s: want apiVersion %s, kind %s", c.APIVersion, c.Kind,
			Version, Kind)
	}
	if _, err := c.VF(); err != nil {
		return nil, err
	}
	_, err = node.ParseBackend(c.Backend)
	return c, err
}

// VF is what a VF is to have; nil if nothing is said of that.
func (c *Device) VF() (sriov.Settings, error) {
	var words []string
	for _, key := range slices.Sorted(maps.Keys(c.Settings)) {
		if key == string(sriov.MSIX) {
			return nil, errors.New("msix cannot be set for a pod: set it in host.yaml")
		}
		words = append(words, key+"="+c.Settings[key])
	}
	if c.MAC != "" {
		words = append(words, "mac="+c.MAC)
	}
	if c.VLAN != nil {
		words = append(words, fmt.Sprintf("vlan=%d", *c.VLAN))
	}
	if len(words) == 0 {
		return nil, nil
	}
	out, err := sriov.ParseSettings(words)
	if err != nil {
		return nil, fmt.Errorf("the device configuration: %w", err)
	}
	return out, nil
}

// Over is one configuration with what another one says instead.
func (c *Device) Over(other *Device) *Device {
	out := *c
	if other.MAC != "" {
		out.MAC = other.MAC
	}
	if other.VLAN != nil {
		out.VLAN = other.VLAN
	}
	if other.Backend != "" {
		out.Backend = other.Backend
	}
	out.Settings = maps.Clone(c.Settings)
	if out.Settings == nil {
		out.Settings = map[string]string{}
	}
	maps.Copy(out.Settings, other.Settings)
	return &out
}
