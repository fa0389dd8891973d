package dra

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	resource "k8s.io/api/resource/v1"
	kjson "sigs.k8s.io/json"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
	"viaduct/sriov"
)

// DeviceConfig is what a claim or a device class may say of a function, as opaque parameters of the driver.
type DeviceConfig struct {
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

// The version and kind of a DeviceConfig.
const (
	ConfigVersion = "viaduct.dev/v1"
	ConfigKind    = "DeviceConfig"
)

// ParseConfig reads opaque parameters. What is not known in them is an error.
func ParseConfig(raw []byte) (*DeviceConfig, error) {
	c := &DeviceConfig{}
	strict, err := kjson.UnmarshalStrict(raw, c)
	if err := errors.Join(append(strict, err)...); err != nil {
		return nil, fmt.Errorf("read the device configuration: %w", err)
	}
	if c.APIVersion != ConfigVersion || c.Kind != ConfigKind {
		return nil, fmt.Errorf("the device configuration is %s, %s: want apiVersion %s, kind %s", c.APIVersion, c.Kind,
			ConfigVersion, ConfigKind)
	}
	if _, err := c.settings(); err != nil {
		return nil, err
	}
	_, err = node.ParseBackend(c.Backend)
	return c, err
}

// settings are those of a VF.
func (c *DeviceConfig) settings() (sriov.Settings, error) {
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

// over is one configuration with what another one says instead.
func (c *DeviceConfig) over(other *DeviceConfig) *DeviceConfig {
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

// Plan is what preparing a claim takes.
type Plan struct {
	Request lease.Request
	Devices []Planned
}

// Planned is one function of a claim.
type Planned struct {
	Result  resource.DeviceRequestAllocationResult
	Address iommu.Address // where it was when it was published
	Backend node.Backend
}

// PlanOf plans what a claim has been allocated of a driver on a node. It looks at nothing.
func PlanOf(claim *resource.ResourceClaim, driver, nodeName string) (*Plan, error) {
	if claim.Status.Allocation == nil {
		return nil, errors.New("the claim is not allocated")
	}
	p := &Plan{Request: lease.Request{Guest: string(claim.UID), For: forWhom(claim, driver), Persist: true}}
	macs := map[string]string{}
	for _, r := range claim.Status.Allocation.Devices.Results {
		if r.Driver != driver {
			continue
		}
		if r.Pool != nodeName {
			return nil, fmt.Errorf("device %s is of pool %s, and this is node %s", r.Device, r.Pool, nodeName)
		}
		if r.AdminAccess != nil && *r.AdminAccess {
			return nil, fmt.Errorf("request %s: there is no admin access to a function, as it cannot be shared",
				r.Request)
		}
		a, err := node.ParseName(r.Device)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", r.Device, err)
		}
		config, err := configOf(claim.Status.Allocation.Devices.Config, r.Request, driver)
		if err != nil {
			return nil, fmt.Errorf("request %s: %w", r.Request, err)
		}
		settings, err := config.settings()
		if err != nil {
			return nil, fmt.Errorf("request %s: %w", r.Request, err)
		}

		if mac := settings[sriov.MAC]; mac != "" && mac != sriov.StableMAC {
			if other := macs[mac]; other != "" {
				return nil, fmt.Errorf("request %s: devices %s and %s would have one MAC address, %s: use stable",
					r.Request, other, r.Device, mac)
			}
			macs[mac] = r.Device
		}
		backend, err := node.ParseBackend(config.Backend)
		if err != nil {
			return nil, err
		}
		p.Request.Sources = append(p.Request.Sources, lease.Source{From: a.String(), Settings: settings})
		p.Devices = append(p.Devices, Planned{Result: r, Address: a, Backend: backend})
	}
	return p, nil
}

// configOf is what class and claim say of a request, the claim above the class, and what comes later above what came
// before.
func configOf(all []resource.DeviceAllocationConfiguration, request, driver string) (*DeviceConfig, error) {
	out := &DeviceConfig{}
	for _, source := range []resource.AllocationConfigSource{
		resource.AllocationConfigSourceClass, resource.AllocationConfigSourceClaim,
	} {
		for _, c := range all {
			if c.Source != source || c.Opaque == nil || c.Opaque.Driver != driver || !concerns(c.Requests, request) {
				continue
			}
			one, err := ParseConfig(c.Opaque.Parameters.Raw)
			if err != nil {
				return nil, err
			}
			out = out.over(one)
		}
	}
	return out, nil
}

// concerns reports whether a configuration is for a request: for all, for it, or for the request that it is an
// alternative of.
func concerns(requests []string, request string) bool {
	base, _, _ := strings.Cut(request, "/")
	return len(requests) == 0 || slices.Contains(requests, request) || slices.Contains(requests, base)
}

// forWhom names a claim, and the pod that it is for as far as that is known, in words that a refusal can quote.
func forWhom(claim *resource.ResourceClaim, driver string) string {
	pod := ""
	for _, c := range claim.Status.ReservedFor {
		if c.APIGroup == "" && c.Resource == "pods" {
			pod = "pod " + claim.Namespace + "/" + c.Name + " by "
			break
		}
	}
	return Mark(fmt.Sprintf("%sclaim %s/%s", pod, claim.Namespace, claim.Name), driver)
}

// Mark ends what a driver's leases say of whom they are for, so that [Ours] knows them.
func Mark(whom, driver string) string { return whom + " of " + driver }

// Ours tells the leases that a driver has made, for claims or for its device plugin, from all others.
func Ours(driver string) func(*lease.Lease) bool {
	return func(l *lease.Lease) bool { return strings.HasSuffix(l.For, Mark("", driver)) }
}
