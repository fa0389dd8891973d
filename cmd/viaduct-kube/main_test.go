package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	resource "k8s.io/api/resource/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
	"sigs.k8s.io/yaml"

	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// do runs the program.
func do(args ...string) (status int, stdout, stderr string) {
	var out, err bytes.Buffer
	status = run(args, &out, &err)
	return status, out.String(), err.String()
}

func TestUsage(t *testing.T) {
	for line, want := range map[string]struct {
		status int
		says   string
	}{
		"":                     {exitUsage, "no command"},
		"fly":                  {exitUsage, `unknown command "fly"`},
		"serve":                {exitUsage, "--node is missing"},
		"serve --node n1 more": {exitUsage, `unexpected argument "more"`},
		"drain":                {exitUsage, "name the node"},
		"manifests Net":        {exitUsage, "lower-case"},
		"cdi --colour":         {exitUsage, "colour"},
		"version":              {exitDone, "viaduct-kube"},
		"help":                 {exitDone, "manifests"},
		"serve -h":             {exitDone, "kubelet's folder"},
	} {
		status, stdout, stderr := do(strings.Fields(line)...)
		if status != want.status || !strings.Contains(stdout+stderr, want.says) {
			t.Errorf("%q: %d\n%s%s", line, status, stdout, stderr)
		}
	}
}

// The manifests are YAML of known kinds, and give no right that is not listed here.
func TestManifests(t *testing.T) {
	status, text, stderr := do("manifests", "net", "gpu", "--namespace", "devices", "--image", "example/viaduct-kube:1")
	if status != exitDone {
		t.Fatal(stderr)
	}

	var kinds []string
	for doc := range strings.SplitSeq(text, "\n---\n") {
		var head meta.PartialObjectMetadata
		if err := yaml.Unmarshal([]byte(doc), &head); err != nil {
			t.Fatalf("%v\n%s", err, doc)
		}
		kinds = append(kinds, head.Kind+" "+head.Name)
		if head.Kind != "ClusterRole" {
			continue
		}
		var role rbac.ClusterRole
		if err := yaml.UnmarshalStrict([]byte(doc), &role); err != nil {
			t.Fatal(err)
		}
		var rights []string
		for _, r := range role.Rules {
			rights = append(rights, strings.Join(r.Resources, ",")+": "+strings.Join(r.Verbs, ","))
		}
		want := []string{
			"resourceclaims: get", "resourceslices: get,list,watch,create,update,patch,delete", "nodes: get",
			"events: create,patch",
		}
		if !slices.Equal(rights, want) {
			t.Errorf("rights %q", rights)
		}
	}

	want := []string{
		"Namespace devices", "DeviceClass viaduct.dev", "DeviceClass net.viaduct.dev", "DeviceClass gpu.viaduct.dev",
		"ServiceAccount viaduct-kube", "ClusterRole viaduct-kube", "ClusterRoleBinding viaduct-kube",
		"ValidatingAdmissionPolicy viaduct-kube", "ValidatingAdmissionPolicyBinding viaduct-kube",
		"DaemonSet viaduct-kube",
	}

	if !slices.Equal(kinds, want) || !strings.Contains(text, "system:serviceaccount:devices:viaduct-kube") {
		t.Errorf("%q", kinds)
	}
}

// devices publishes devices of two PFs on a node, and a claim of a pod that has one.
func cluster(t *testing.T) *fake.Clientset {
	t.Helper()
	text := func(s string) resource.DeviceAttribute { return resource.DeviceAttribute{StringValue: &s} }
	device := func(name, pf, pool string) resource.Device {
		return resource.Device{Name: name, Attributes: map[resource.QualifiedName]resource.DeviceAttribute{
			"pf": text(pf), "pool": text(pool),
		}}
	}
	c := &resource.ResourceClaim{ObjectMeta: meta.ObjectMeta{Namespace: "default", Name: "nic"}}
	c.Status.Allocation = &resource.AllocationResult{}
	c.Status.Allocation.Devices.Results = []resource.DeviceRequestAllocationResult{
		{Request: "a", Driver: "viaduct.dev", Pool: "n1", Device: "0000-01-10-0"},
	}
	c.Status.ReservedFor = []resource.ResourceClaimConsumerReference{{Resource: "pods", Name: "web"}}
	return fake.NewClientset(c, &resource.ResourceSlice{
		ObjectMeta: meta.ObjectMeta{Name: "one"},
		Spec: resource.ResourceSliceSpec{Driver: "viaduct.dev", Pool: resource.ResourcePool{Name: "n1"},
			Devices: []resource.Device{
				device("0000-01-10-0", "0000:01:00.0", "net"), device("0000-01-10-2", "0000:01:00.0", "net"),
				device("0000-02-10-0", "0000:02:00.0", "old"),
			}},
	})
}

func rulesOf(t *testing.T, client *fake.Clientset) []string {
	t.Helper()
	list, err := client.ResourceV1().DeviceTaintRules().List(t.Context(), meta.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range list.Items {
		name := r.Name + " " + r.Spec.Taint.Key + " " + string(r.Spec.Taint.Effect)
		if r.Spec.DeviceSelector.Device != nil {
			name += " " + *r.Spec.DeviceSelector.Device
		}
		out = append(out, name)
	}
	return out
}

// A drain keeps pods away from what is meant, and ends when none has it; ended, pods may have it again.
func TestDrain(t *testing.T) {
	for selector, want := range map[string][]string{
		"":             {"viaduct-drain-n1 viaduct.dev/drain NoExecute"},
		"pool=old":     {"viaduct-drain-n1-0000-02-10-0 viaduct.dev/drain NoExecute 0000-02-10-0"},
		"0000:01:10.0": {"viaduct-drain-n1-0000-01-10-0 viaduct.dev/drain NoExecute 0000-01-10-0"},
		"0000:01:00.0": {"viaduct-drain-n1-0000-01-10-0 viaduct.dev/drain NoExecute 0000-01-10-0",
			"viaduct-drain-n1-0000-01-10-2 viaduct.dev/drain NoExecute 0000-01-10-2"},
		"0000:09:00.0":  nil,
		"pool=whatever": nil,
	} {
		client := cluster(t)
		o := &drainOptions{common: common{driver: "viaduct.dev"}, node: "n1", selectors: strings.Fields(selector)}
		ctx, cancel := context.WithCancel(t.Context())
		out, in := io.Pipe()
		ended := make(chan error, 1)
		go func() {
			ended <- drain(ctx, client, o, in)
			in.Close()
		}()
		told := make([]byte, 1000)
		n, _ := out.Read(told)
		go func() { _, _ = io.Copy(io.Discard, out) }()
		if want == nil {
			if err := <-ended; err == nil || !strings.Contains(err.Error(), "no such function") {
				t.Errorf("%s: %v", selector, err)
			}
			cancel()
			continue
		}
		if got := rulesOf(t, client); !slices.Equal(got, want) {
			t.Errorf("%s: %q", selector, got)
		}
		waits := "n1: waiting for claim default/nic of pod web\n"
		if text := string(told[:n]); selector != "pool=old" && text != waits || selector == "pool=old" &&
			text == waits {
			t.Errorf("%s: it told %s", selector, text)
		}
		err := client.ResourceV1().ResourceClaims("default").Delete(t.Context(), "nic", meta.DeleteOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Errorf("%s: %v", selector, err)
		}
		cancel()

		o.end = true
		if err := drain(t.Context(), client, o, io.Discard); err != nil || len(rulesOf(t, client)) > 0 {
			t.Errorf("%s: ended: %v, %q", selector, err, rulesOf(t, client))
		}
	}
}

// newNode is a host with a pool of two VFs, and a folder for a kubelet that is not there.
func newNode(t *testing.T, config string) (*iommu.Host, *serveOptions) {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0")
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", "2"}} {
		if err := k.Write("sys/bus/pci/devices/0000:01:00.0/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(k.Dir(), "etc/viaduct/host.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	text := "pfs:\n  - select: 0000:01:00.0\n    count: 2\n    vfs:\n      - {driver: none, pool: net}\n"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o := &serveOptions{node: "n1", common: common{
		driver: "viaduct.dev", kubeletDir: dir, cdiDir: t.TempDir(), config: filepath.Join(dir, "kube.yaml"),
	}}
	if err := os.MkdirAll(filepath.Join(dir, "plugins/viaduct.dev"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(o.config, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	return &iommu.Host{Host: k.Host()}, o
}

// What another driver publishes of this node is not served too, and its driver is named. If that begins later, the
// function is shared for as long as it lasts.
func TestForeignDriver(t *testing.T) {
	id, name := "0000:01:10.0", "n1"
	other := &resource.ResourceSlice{ObjectMeta: meta.ObjectMeta{Name: "other"}, Spec: resource.ResourceSliceSpec{
		Driver: "sriovnetwork.k8snetworkplumbingwg.io", NodeName: &name,
		Devices: []resource.Device{{Name: "vf", Attributes: map[resource.QualifiedName]resource.DeviceAttribute{
			"resource.kubernetes.io/pciBusID": {StringValue: &id},
		}}},
	}}
	for config, refused := range map[string]bool{"{}": true, "pools: {net: none}": false} {
		h, o := newNode(t, config)
		s, err := newServer(h, fake.NewClientset(other), o, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.check(t.Context())
		if (err != nil) != refused ||
			refused && !strings.Contains(err.Error(),
				"sriovnetwork.k8snetworkplumbingwg.io gives out 0000:01:10.0 too") {
			t.Errorf("%s: %v", config, err)
		}
	}

	// It may begin to later, and end.
	h, o := newNode(t, "{}")
	client := fake.NewClientset()
	s, err := newServer(h, client, o, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.check(t.Context()); err != nil {
		t.Fatal(err)
	}
	published := client.ResourceV1().ResourceSlices()
	see := func(want bool) {
		t.Helper()
		functions, _, err := s.look()
		if err != nil {
			t.Fatal(err)
		}
		s.share(t.Context(), functions)
		if got := functions[0].Has(node.Shared); got != want {
			t.Errorf("%s is shared: %t: %s", functions[0].Address, got, functions[0].Why())
		}
	}
	if _, err := published.Create(t.Context(), other, meta.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	see(false) // as it was asked just now
	s.asked = time.Time{}
	see(true)
	if err := published.Delete(t.Context(), other.Name, meta.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.asked = time.Time{}
	see(false)
}

// The server publishes what the node has, and ends with its context.
func TestServe(t *testing.T) {
	h, o := newNode(t, "{}")
	dir, err := os.MkdirTemp("", "kl") // the path of a socket has an end
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	o.kubeletDir = dir
	client := fake.NewClientset(&core.Node{ObjectMeta: meta.ObjectMeta{Name: "n1", UID: "uid"}})
	cannotSee(t, h, "devices")
	var log bytes.Buffer
	s, err := newServer(h, client, o, io.MultiWriter(&log, t.Output()))
	if err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w, err := client.ResourceV1().ResourceSlices().Watch(ctx, meta.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}

	ended := make(chan error, 1)
	go func() { ended <- s.run(ctx) }()
	// Nothing is published before the kubelet has taken the driver.
	registrar, err := grpc.NewClient("unix://"+filepath.Join(dir, "plugins_registry", s.driver+"-reg.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer registrar.Close()
	kubelet := registration.NewRegistrationClient(registrar)
	if _, err := kubelet.GetInfo(ctx, &registration.InfoRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	if n := len(w.ResultChan()); n > 0 {
		t.Errorf("%d slices are published before", n)
	}
	taken := &registration.RegistrationStatus{PluginRegistered: true}
	if _, err := kubelet.NotifyRegistrationStatus(ctx, taken); err != nil {
		t.Fatal(err)
	}

	select {
	case e := <-w.ResultChan():
		slice, is := e.Object.(*resource.ResourceSlice)
		if !is || len(slice.Spec.Devices) != 2 || slice.Spec.Pool.Name != "n1" || *slice.Spec.NodeName != "n1" {
			t.Errorf("published %+v", e.Object)
		}
	case err := <-ended:
		t.Fatal(err)
	case <-ctx.Done():
		t.Fatal("nothing is published")
	}

	var page bytes.Buffer
	s.counts.write(&page)
	if !strings.Contains(page.String(), `viaduct_functions{pool="net",provider="dra"} 2`) {
		t.Errorf("metrics\n%s", page.String())
	}

	record, err := node.ReadRecord(s.recordFile())
	if err != nil || len(record) != 2 {
		t.Errorf("who serves what is written down as %v, %v", record, err)
	}

	cancel()
	if err := <-ended; err != nil {
		t.Errorf("at its end: %v", err)
	}
	if !strings.Contains(log.String(), "LookFailed: declared devices cannot be looked at: ") {
		t.Errorf("what cannot be looked at is not told:\n%s", log.String())
	}
}

// cannotSee makes something unknown of what is declared: whether it is what it was.
func cannotSee(t *testing.T, h *iommu.Host, what string) {
	t.Helper()
	name, more := "0000:01:00.0", ""
	if what == "devices" {
		name = "0000:00:05.0"
		more = "devices:\n  - select: " + name + "\n"
	}
	file := h.Path("etc/viaduct/host.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	known := h.Path("var/lib/viaduct/known-" + name + ".json")
	if err := errors.Join(os.WriteFile(file, append(text, more...), 0o644), os.MkdirAll(filepath.Dir(known), 0o755),
		os.WriteFile(known, []byte("{"), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// The specifications of pools are written of the host as it is, without the cluster.
func TestCDICommand(t *testing.T) {
	h, o := newNode(t, "{}")
	var stderr bytes.Buffer
	if err := writeCDI(h, &o.common, &stderr); err != nil || stderr.Len() > 0 {
		t.Fatal(err, stderr.String())
	}
	text, err := os.ReadFile(filepath.Join(o.cdiDir, "viaduct.dev-pool-net.json"))
	if err != nil || !strings.Contains(string(text), `"kind": "viaduct.dev/net"`) {
		t.Errorf("%s, %v", text, err)
	}
}

// What is declared and cannot be looked at is told.
func TestCDICannotSee(t *testing.T) {
	for what, want := range map[string]string{
		"devices": "declared devices cannot be looked at: 0000:00:05.0: ",
		"pool":    "functions of a pool cannot be looked at: pool \"net\": ",
	} {
		h, o := newNode(t, "{}")
		cannotSee(t, h, what)
		var stderr bytes.Buffer
		if err := writeCDI(h, &o.common, &stderr); err != nil || !strings.Contains(stderr.String(), want) {
			t.Errorf("%s: %v, it says %q", what, err, stderr.String())
		}
	}
}
