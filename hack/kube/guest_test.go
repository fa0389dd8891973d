//go:build lab

package kube

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
)

// guestScript runs a virtual machine with the VF that the pod has, whose address the file with the device's
// attributes says.
const guestScript = `vf=$(cat /var/run/kubernetes.io/dra-device-attributes/resourceclaims/guest/device/*.json |
	tr -d '\n ' | grep -o 'pciBusID":{"string":"[^"]*' | head -n 1 | cut -d '"' -f 5)
echo the VF is $vf
qemu-system-x86_64 -nodefaults -display none -serial stdio -no-reboot -machine q35,accel=tcg,sata=off \
	-cpu qemu64 -m 256M \
	-kernel /guest/vmlinuz -initrd /guest/initrd -device vfio-pci,host=$vf \
	-append "console=ttyS0 quiet panic=-1 nokaslr no_timer_check noapic mitigations=off tsc=reliable \
		guest.ip=10.7.0.2 guest.ping=10.7.0.1" \
	</dev/null
echo the guest has ended with $?
exec sleep 2000000000`

// TestGuest: a virtual machine in a pod drives the VF by the VF's own driver, with the MAC address of the claim; when
// the pod is gone the VF is as new.
func TestGuest(t *testing.T) {
	served(t)
	pf := functions(firstNIC)[0]
	shell(t, "ip address replace 10.7.0.1/24 dev "+netdev(pf))
	claimWith(t, "guest", poolClass, `mac: "52:54:00:aa:00:02", settings: {spoofchk: "off"}`)
	before := map[string]string{}
	for _, vf := range virtualFunctions(pf) {
		before[vf] = shown(t, vf)
	}

	makePod(t, newPod("guest", guestScript, ofClaim("guest"), hostFolder("usr", "/usr"),
		hostFolder("guest", "/job/guest"),
		func(p *core.Pod) {
			c := &p.Spec.Containers[0]
			c.Env = []core.EnvVar{{Name: "PATH", Value: "/usr/bin:/bin"}}
			// The guest's memory is locked, as VFIO maps it for the device.
			c.SecurityContext = &core.SecurityContext{Capabilities: &core.Capabilities{Add: []core.Capability{"IPC_LOCK"}}}
		}))
	p := awaitPod(t, "guest", "runs", running)
	awaitWords(t, p, "the guest has ended")
	words := strings.ReplaceAll(said(t, p), "\r", "")
	for _, want := range []string{"driver igbvf eth0 52:54:00:aa:00:02", "3 packets transmitted, 3 packets received"} {
		if !strings.Contains(words, want) {
			t.Errorf("the guest does not say %q:\n%s", want, words)
		}
	}

	vf := allocated(t, "guest")
	deletePod(t, "guest")
	noLease(t, vf)
	if line := shown(t, vf); line != before[vf] {
		t.Errorf("the VF is %s, and was %s", line, before[vf])
	}
	if d := link(vf, "driver"); d != "vfio-pci" {
		t.Errorf("the VF is on %q", d)
	}
	b, err := os.ReadFile("/run/viaduct/scrubbed-" + vf + ".json")
	if err != nil || !json.Valid(b) {
		t.Errorf("the VF's certificate: %v\n%s", err, b)
	}
	t.Logf("the certificate: %s", b)
}

// hostFolder gives the pod's container a folder of the host's, to read.
func hostFolder(name, path string) func(*core.Pod) {
	return func(p *core.Pod) {
		p.Spec.Volumes = append(p.Spec.Volumes, core.Volume{
			Name: name, VolumeSource: core.VolumeSource{HostPath: &core.HostPathVolumeSource{Path: path}},
		})
		c := &p.Spec.Containers[0]
		c.VolumeMounts = append(c.VolumeMounts, core.VolumeMount{Name: name, MountPath: "/" + name, ReadOnly: true})
	}
}
