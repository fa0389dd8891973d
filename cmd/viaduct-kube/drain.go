package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	resource "k8s.io/api/resource/v1"
	kerrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
)

// drainOptions are those of drain.
type drainOptions struct {
	common
	node, kubeconfig string
	selectors        []string
	timeout          time.Duration
	end, keep        bool
}

func drainCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o drainOptions
	f := flag.NewFlagSet("drain", flag.ContinueOnError)
	o.flags(f)
	f.StringVar(&o.node, "node", "", "`name` of the node")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "`file` that says how to reach the cluster")
	f.DurationVar(&o.timeout, "timeout", 5*time.Minute, "wait this long for the pods to end")
	f.BoolVar(&o.end, "end", false, "end the drain: let pods have the functions again")
	f.BoolVar(&o.keep, "no-evict", false, "keep new pods away, and wait until those that run have ended")
	f.Usage = func() {
		fmt.Fprint(stderr, "usage: viaduct-kube drain [OPTION...] NODE [SELECTOR...]\n\n"+
			"A SELECTOR is the address of a function, of a PF whose VFs are meant too, or pool=NAME; without one\n"+
			"all functions of the node are drained. When drain has ended, viaduct apply can go on; then end the\n"+
			"drain.\n\n")
		f.PrintDefaults()
	}

	var err error
	if o.selectors, err = parse(f, args, stderr); err != nil {
		return err
	}
	if o.node == "" && len(o.selectors) > 0 {
		o.node, o.selectors = o.selectors[0], o.selectors[1:]
	}
	if o.node == "" {
		return usageError{errors.New("drain: name the node")}
	}

	client, err := connect(o.kubeconfig)
	if err != nil {
		return err
	}

	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	return drain(ctx, client, &o, stdout)
}

// drain keeps pods away from functions, and waits until none has one.
func drain(ctx context.Context, client kubernetes.Interface, o *drainOptions, stdout io.Writer) error {
	devices, err := o.devices(ctx, client)
	if err != nil {
		return err
	}
	rules := o.rules(devices)
	if o.end {
		for _, r := range rules {
			err := client.ResourceV1().DeviceTaintRules().Delete(ctx, r.Name, meta.DeleteOptions{})
			if err != nil && !kerrors.IsNotFound(err) {
				return fmt.Errorf("end the drain: %w", err)
			}
		}
		fmt.Fprintf(stdout, "%s: the drain has ended\n", o.node)
		return nil
	}
	for _, r := range rules {
		_, err := client.ResourceV1().DeviceTaintRules().Create(ctx, r, meta.CreateOptions{})
		if err != nil && !kerrors.IsAlreadyExists(err) {
			return fmt.Errorf("keep pods away: %w", err)
		}
	}
	return o.await(ctx, client, devices, stdout)
}

// devices are the names of the functions that are meant; nil for all of the node.
func (o *drainOptions) devices(ctx context.Context, client kubernetes.Interface) (map[string]bool, error) {
	if len(o.selectors) == 0 {
		return nil, nil
	}
	list, err := client.ResourceV1().ResourceSlices().List(ctx, meta.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the functions of %s: %w", o.node, err)
	}
	out := map[string]bool{}
	for _, sel := range o.selectors {
		before := len(out)
		for i := range list.Items {
			spec := &list.Items[i].Spec
			if spec.Driver != o.driver || spec.Pool.Name != o.node {
				continue
			}
			for _, d := range spec.Devices {
				if meant(sel, &d) {
					out[d.Name] = true
				}
			}
		}
		if len(out) == before {
			return nil, fmt.Errorf("%s: node %s has no such function", sel, o.node)
		}
	}
	return out, nil
}

// meant reports whether a selector means a device.
func meant(sel string, d *resource.Device) bool {
	is := func(name, value string) bool {
		a := d.Attributes[resource.QualifiedName(name)].StringValue
		return a != nil && *a == value
	}
	if pool, named := strings.CutPrefix(sel, "pool="); named {
		return is("pool", pool)
	}
	a, err := iommu.ParseAddress(sel)
	return err == nil && (d.Name == node.NameOf(a) || is("pf", a.String()))
}

// rules are what keeps pods away: one of all functions, or one of each.
func (o *drainOptions) rules(devices map[string]bool) []*resource.DeviceTaintRule {
	effect := resource.DeviceTaintEffectNoExecute
	if o.keep {
		effect = resource.DeviceTaintEffectNoSchedule
	}
	rule := func(name string, device *string) *resource.DeviceTaintRule {
		return &resource.DeviceTaintRule{
			ObjectMeta: meta.ObjectMeta{Name: name},
			Spec: resource.DeviceTaintRuleSpec{
				DeviceSelector: &resource.DeviceTaintSelector{Driver: &o.driver, Pool: &o.node, Device: device},
				Taint:          resource.DeviceTaint{Key: o.driver + "/drain", Value: "true", Effect: effect},
			},
		}
	}
	name := "viaduct-drain-" + o.node
	if devices == nil {
		return []*resource.DeviceTaintRule{rule(name, nil)}
	}
	var out []*resource.DeviceTaintRule
	for _, d := range slices.Sorted(maps.Keys(devices)) {
		out = append(out, rule(name+"-"+d, &d))
	}
	return out
}

// await waits until no claim has one of the functions. The devices are clean then: a claim is deallocated when its pod
// is gone, and the kubelet has unprepared it by that.
func (o *drainOptions) await(ctx context.Context, client kubernetes.Interface, devices map[string]bool,
	stdout io.Writer) error {
	told := ""
	for {
		users, err := o.users(ctx, client, devices)
		if ctx.Err() == nil && err != nil {
			return err
		}
		if err == nil && len(users) == 0 {
			fmt.Fprintf(stdout, "%s: no pod has one of the functions; viaduct apply can go on, and then "+
				"viaduct-kube drain --end %s\n", o.node, strings.Join(append([]string{o.node}, o.selectors...), " "))
			return nil
		}
		if text := strings.Join(users, ", "); err == nil && text != told {
			told = text
			fmt.Fprintf(stdout, "%s: waiting for %s\n", o.node, text)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("functions of %s are still in use by %s: delete what keeps them, and run drain again",
				o.node, told)
		case <-time.After(time.Second):
		}
	}
}

// users are the claims that have one of the functions, with their pods.
func (o *drainOptions) users(ctx context.Context, client kubernetes.Interface,
	devices map[string]bool) ([]string, error) {
	list, err := client.ResourceV1().ResourceClaims("").List(ctx, meta.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the claims: %w", err)
	}
	var out []string
	for i := range list.Items {
		c := &list.Items[i]
		// One that no pod has reserved is only allocated, and the node has it no more.
		if c.Status.Allocation == nil || len(c.Status.ReservedFor) == 0 {
			continue
		}
		has := func(r resource.DeviceRequestAllocationResult) bool {
			return r.Driver == o.driver && r.Pool == o.node && (devices == nil || devices[r.Device])
		}
		if !slices.ContainsFunc(c.Status.Allocation.Devices.Results, has) {
			continue
		}
		name := []string{"claim " + c.Namespace + "/" + c.Name}
		for _, by := range c.Status.ReservedFor {
			name = append(name, strings.TrimSuffix(by.Resource, "s")+" "+by.Name)
		}
		out = append(out, strings.Join(name, " of "))
	}
	return out, nil
}
