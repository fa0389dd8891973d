//go:build lab

package kube

import (
	"fmt"
	"os"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestKillsDriver: the driver is killed at each of its writes to the host, from a pod's beginning to its end. The next
// driver finishes what was begun: the pod comes to run with its VF, or ends, and the VF is as it was before.
func TestKillsDriver(t *testing.T) {
	step := 4
	if os.Getenv("LAB_ROUNDS") == "200" {
		step = 1
	}
	last := served(t)
	vf := virtualFunctions(functions(firstNIC)[0])[0]
	fresh := shown(t, vf)
	for n := 1; ; n += step {
		name := fmt.Sprintf("killed-%d", n)
		last.end(os.Interrupt)
		p := serve(t, []string{killAt, fmt.Sprint(n), "both"})
		claimFor(t, name, vf)
		makePod(t, newPod(name, holds, ofClaim(name)))

		killedAt := "prepare"
		if !either(t, p, name+" runs", func() bool { return runs(t, name) }) {
			p = serve(t, nil)
			opened(t, name)
		} else {
			killedAt = "unprepare"
		}
		if line := shown(t, vf); !strings.Contains(line, "52:54:00:aa:00:09") {
			t.Fatalf("killed at write %d, the pod has the VF as %s", n, line)
		}

		remove(t, name)
		ended := either(t, p, name+" is gone", func() bool { return isGone(t, name) })
		if !ended {
			p = serve(t, nil)
		}
		deletePod(t, name)
		forget(t, name)
		noLease(t, vf)
		if line := shown(t, vf); line != fresh {
			t.Fatalf("killed at write %d of %s, the VF is left as\n%s, and was\n%s", n, killedAt, line, fresh)
		}
		last = p
		if ended && killedAt == "unprepare" {
			t.Logf("%d writes to the host, killed at every %d", n-1, step)
			return
		}
	}
}

// claimFor makes a claim of this function with a MAC address.
func claimFor(t *testing.T, name, pci string) {
	t.Helper()
	has(t, fmt.Sprintf(claimText, name, driverName, fmt.Sprintf(`
          selectors:
            - cel: {expression: 'device.attributes["resource.kubernetes.io"].pciBusID == %q'}`, pci), `    config:
      - opaque:
          driver: `+driverName+`
          parameters: {apiVersion: viaduct.dev/v1, kind: DeviceConfig, mac: "52:54:00:aa:00:09"}
`))
}

// either waits until it is so, and reports whether it was: the process may have ended before.
func either(t *testing.T, p *process, what string, is func() bool) bool {
	t.Helper()
	err := until(what, p, func() error {
		if is() {
			return nil
		}
		return fmt.Errorf("not yet")
	})
	if err != nil && p.alive() {
		t.Fatalf("%v\n%s", err, up.whatTheySay())
	}
	return err == nil
}

func runs(t *testing.T, pod string) bool {
	t.Helper()
	p, err := up.client.CoreV1().Pods(namespace).Get(t.Context(), pod, meta.GetOptions{})
	return err == nil && running(p) && strings.Contains(said(t, p), "opened ")
}

func isGone(t *testing.T, pod string) bool {
	t.Helper()
	_, err := up.client.CoreV1().Pods(namespace).Get(t.Context(), pod, meta.GetOptions{})
	return apierrors.IsNotFound(err)
}

// remove has a pod deleted, and does not wait.
func remove(t *testing.T, pod string) {
	t.Helper()
	if err := up.client.CoreV1().Pods(namespace).Delete(t.Context(), pod, meta.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// noLease reports that the node's books have a lease of a function.
func noLease(t *testing.T, pci string) {
	t.Helper()
	if out := do(t, "leases"); strings.Contains(out, pci) {
		t.Errorf("%s is still leased:\n%s", pci, out)
	}
}
