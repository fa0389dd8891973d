//go:build lab

package kube

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	authentication "k8s.io/api/authentication/v1"
	resource "k8s.io/api/resource/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// What is tested is in the folder that has the tests' program.
var (
	viaduct = beside("viaduct")
	driver  = beside("viaduct-kube")
	killAt  = beside("killat")
)

func beside(name string) string {
	program, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return filepath.Join(filepath.Dir(program), name)
}

const devicesDir = "/sys/bus/pci/devices"

// The host's functions, as hack/lab.d/hosts/kube has them.
const (
	firstNIC  = "0x10c9" // igb
	sharedNIC = "0x100e" // e1000, of which two are in one group
)

// functions are the addresses of all functions with this device id.
func functions(id string) []string {
	var out []string
	entries, _ := os.ReadDir(devicesDir)
	for _, e := range entries {
		if attribute(e.Name(), "device") == id {
			out = append(out, e.Name())
		}
	}
	return out
}

// attribute is one of a function's, "" if it is not there.
func attribute(pci, name string) string {
	b, err := os.ReadFile(filepath.Join(devicesDir, pci, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// link is the last element of what one of a function's links leads to, "" if it is not there.
func link(pci, name string) string {
	target, err := os.Readlink(filepath.Join(devicesDir, pci, name))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

// netdev is the interface of a function, "" if it has none.
func netdev(pci string) string {
	entries, err := os.ReadDir(filepath.Join(devicesDir, pci, "net"))
	if err != nil || len(entries) == 0 {
		return ""
	}
	return entries[0].Name()
}

// shown is what ip says of a VF.
func shown(t *testing.T, vf string) string {
	t.Helper()
	pf := link(vf, "physfn")
	for line := range strings.Lines(shell(t, "ip -details link show "+netdev(pf))) {
		var n int
		if _, err := fmt.Sscanf(strings.TrimSpace(line), "vf %d ", &n); err == nil &&
			link(pf, fmt.Sprintf("virtfn%d", n)) == vf {
			return strings.TrimSpace(line)
		}
	}
	t.Fatalf("ip shows nothing of %s", vf)
	return ""
}

// shell runs a command line, which must succeed.
func shell(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("bash", "-euc", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// do runs viaduct, which must succeed.
func do(t *testing.T, args ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(viaduct, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("viaduct %s: %v\n%s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String()
}

// try runs a program, and returns all that it says, and its exit status.
func try(name string, args ...string) (string, int) {
	cmd := exec.Command(name, args...)
	out, _ := cmd.CombinedOutput()
	return string(out), cmd.ProcessState.ExitCode()
}

// declared is the host that all scenarios have.
const declared = `pfs:
  - select: mac=52:54:00:00:01:01
    count: 7
    vfs:
      - driver: vfio
        pool: net
devices:
  - select: mac=52:54:00:00:03:01
`

// declare makes the host what is declared, as it is before a kubelet starts.
func declare(t *testing.T, text string) {
	t.Helper()
	write(t, "/etc/viaduct/host.yaml", text)
	for _, pf := range functions(firstNIC) {
		if n := netdev(pf); n != "" {
			shell(t, "ip link set "+n+" up")
		}
	}
	do(t, "apply")
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// manifests are the objects that the driver prints for a cluster.
func manifests(t *testing.T, args ...string) []*unstructured.Unstructured {
	t.Helper()
	out, err := exec.Command(driver, append(append([]string{"manifests"}, args...), "net")...).Output()
	if err != nil {
		t.Fatalf("viaduct-kube manifests: %v", err)
	}
	objects, err := parse(string(out))
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// served serves the host's functions for as long as the test runs: by a process of the host, with the token of the
// service account that the manifests have, and its rights alone.
func served(t *testing.T) *process {
	t.Helper()
	endDriver(t)
	declare(t, declared)
	installed(t)
	p := serve(t, nil)
	awaitDevices(t, "are published", func(all []resource.Device) bool { return len(all) >= 7 })
	return p
}

// installed has the cluster know the driver: what the manifests have, without the daemon set.
func installed(t *testing.T) {
	t.Helper()
	for _, o := range manifests(t) {
		if o.GetKind() != "DaemonSet" {
			if err := up.set(o); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// endDriver ends the driver that runs when the test ends. It is to be said before pods are made: those need the
// driver to end.
func endDriver(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		if up.driver == nil {
			return
		}
		up.driver.end(syscall.SIGTERM)
		forgetDevices(t)
		if t.Failed() {
			t.Logf("the driver:\n%s", lastLines("viaduct-kube", 60))
		}
	})
}

// forgetDevices has the cluster forget what a driver that has ended published. It stays for half a minute, for the next
// one: pods would be scheduled before the kubelet knows that.
func forgetDevices(t *testing.T) {
	t.Helper()
	err := up.client.ResourceV1().ResourceSlices().DeleteCollection(context.Background(), meta.DeleteOptions{},
		meta.ListOptions{FieldSelector: resource.ResourceSliceSelectorDriver + "=" + driverName})
	if err != nil {
		t.Error(err)
	}
}

// serve starts the driver.
func serve(t *testing.T, through []string) *process {
	t.Helper()
	line := append(through, driver, "serve", "--node", node, "--kubeconfig", accountConfig(t))
	p, err := begin("viaduct-kube", nil, line[0], line[1:]...)
	if err != nil {
		t.Fatal(err)
	}
	up.driver = p
	return p
}

// accountConfig is a file with which a program has the driver's rights: with a token of its service account for this
// node.
func accountConfig(t *testing.T) string {
	t.Helper()
	for _, o := range manifests(t) {
		if o.GetKind() != "ServiceAccount" {
			continue
		}
		n, err := up.client.CoreV1().Nodes().Get(t.Context(), node, meta.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		r, err := up.client.CoreV1().ServiceAccounts(o.GetNamespace()).CreateToken(t.Context(), o.GetName(),
			&authentication.TokenRequest{Spec: authentication.TokenRequestSpec{
				BoundObjectRef: &authentication.BoundObjectReference{
					Kind: "Node", APIVersion: "v1", Name: node, UID: n.UID,
				},
			}}, meta.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		file, err := kubeconfigFor("driver", r.Status.Token)
		if err != nil {
			t.Fatal(err)
		}
		return file
	}
	t.Fatal("the manifests have no service account")
	return ""
}
