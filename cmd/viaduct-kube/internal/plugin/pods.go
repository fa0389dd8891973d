package plugin

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	pods "k8s.io/kubelet/pkg/apis/podresources/v1"

	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
)

// Kubelet is what the kubelet says of its pods and device plugins. Its owner closes it.
type Kubelet struct {
	conn   *grpc.ClientConn
	client pods.PodResourcesListerClient
}

// PodResources is the kubelet's socket, below its folder.
const PodResources = "pod-resources/kubelet.sock"

// Ask opens the kubelet's socket, when it is first asked.
func Ask(socket string) (*Kubelet, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &Kubelet{conn, pods.NewPodResourcesListerClient(conn)}, nil
}

// Close ends it.
func (k *Kubelet) Close() { _ = k.conn.Close() }

// patience is how long the kubelet may take for an answer.
const patience = 10 * time.Second

// Used are the pods that have devices of a domain's resources, as NAMESPACE/NAME, by resource and device.
func (k *Kubelet) Used(ctx context.Context, domain string) (map[string]map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	all, err := k.client.List(ctx, &pods.ListPodResourcesRequest{})
	if err != nil {
		return nil, err
	}
	out := map[string]map[string]string{}
	for _, pod := range all.PodResources {
		for _, c := range pod.Containers {
			for _, d := range c.Devices {
				if !strings.HasPrefix(d.ResourceName, domain+"/") {
					continue
				}
				if out[d.ResourceName] == nil {
					out[d.ResourceName] = map[string]string{}
				}
				for _, id := range d.DeviceIds {
					out[d.ResourceName][id] = pod.Namespace + "/" + pod.Name
				}
			}
		}
	}
	return out, nil
}

// Claims are the functions that device plugins of others give out on this node. Most call their devices by address;
// KubeVirt's own plugin calls them by IOMMU group, which is taken for that where each of its devices is a group that
// VFIO has.
func (k *Kubelet) Claims(ctx context.Context, domain string, functions []node.Function,
	vfio func(group string) bool) ([]node.Claim, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	all, err := k.client.GetAllocatableResources(ctx, &pods.AllocatableResourcesRequest{})
	if err != nil {
		return nil, err
	}
	groups := map[string][]iommu.Address{}
	for i := range functions {
		if g := functions[i].Group; g != nil {
			groups[strconv.Itoa(*g)] = append(groups[strconv.Itoa(*g)], functions[i].Address)
		}
	}

	var out []node.Claim
	for _, d := range all.Devices {
		if strings.HasPrefix(d.ResourceName, domain+"/") {
			continue
		}
		byGroup := !slices.ContainsFunc(d.DeviceIds, func(id string) bool { return !vfio(id) })
		for _, id := range d.DeviceIds {
			if a, err := iommu.ParseAddress(id); err == nil {
				out = append(out, node.Claim{Provider: d.ResourceName, Address: a})
			}
			if byGroup {
				for _, a := range groups[id] {
					out = append(out, node.Claim{Provider: d.ResourceName, Address: a})
				}
			}
		}
	}
	return out, nil
}
