package dra

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	resource "k8s.io/api/resource/v1"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/config"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
	"viaduct/sriov"
)

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
		said, err := configOf(claim.Status.Allocation.Devices.Config, r.Request, driver)
		if err != nil {
			return nil, fmt.Errorf("request %s: %w", r.Request, err)
		}
		settings, err := said.VF()
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
		backend, err := node.ParseBackend(said.Backend)
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
func configOf(all []resource.DeviceAllocationConfiguration, request, driver string) (*config.Device, error) {
	out := &config.Device{}
	for _, source := range []resource.AllocationConfigSource{
		resource.AllocationConfigSourceClass, resource.AllocationConfigSourceClaim,
	} {
		for _, c := range all {
			if c.Source != source || c.Opaque == nil || c.Opaque.Driver != driver || !concerns(c.Requests, request) {
				continue
			}
			one, err := config.Parse(c.Opaque.Parameters.Raw)
			if err != nil {
				return nil, err
			}
			out = out.Over(one)
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
