package declared

import (
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// imported is a host with files of all the tools that are imported.
func imported() hosttest.Tree {
	const network = "etc/systemd/network/"
	return twoCards(hosttest.Tree{
		"etc/netplan/a.yaml": "network:\n  ethernets:\n" +
			"    enp1s0f0: {match: {macaddress: 3C:FD:FE:00:00:01}, mtu: 9000, virtual-function-count: 3}\n" +
			"    glob: {match: {name: \"enp2s*\", driver: [i40e]}, virtual-function-count: 2}\n",
		network + "10-a.link": "[Match]\nPath=pci-0000:01:00.0*\n[Link]\nName=lan0\nSR-IOVVirtualFunctions=4\nMTUBytes=9000\n" +
			"[SR-IOV]\nVirtualFunction=0\nVLANId=15\n",
		network + "10-a.link.d/o.conf":     "[Link]\nSR-IOVVirtualFunctions=6\n[SR-IOV]\nVirtualFunction=0\nTrust=no\n",
		network + "20-b.link":              "[Match]\nDriver=!e1000 ixgbe\n[Link]\nSR-IOVVirtualFunctions=8\n",
		network + "30-c.link":              "[Match]\nPermanentMACAddress=3c:fd:fe:00:00:09\n[Link]\nSR-IOVVirtualFunctions=2\n",
		network + "50-a.network":           "[Match]\nName=lan0\n[SR-IOV]\nVirtualFunction=2\nVLANId=7\n",
		"proc/cmdline":                     "quiet vfio-pci.ids=8086:1572,1234:5678\n",
		"etc/modprobe.d/i40e.conf":         "options i40e max_vfs=0,5\noptions vfio-pci ids=8086:3420\n",
		"etc/driverctl.d/pci-0000:01:00.0": "vfio-pci\n", "etc/driverctl.d/pci-0000:02:00.0": "vfio-pci\n",
	})
}

// A look that fails is told, or does not matter: nothing that could not be read is left out of what is found.
func TestLooksThatFail(t *testing.T) {
	importer := func() *hosttest.Kernel { return hosttest.NewKernel(t, imported()) }
	applied := func() *hosttest.Kernel {
		k := sweptHost(t)
		k.ChangeNet(func(n *hosttest.Network) {
			n.Routes = []hosttest.Route{{To: "default",
				Over: []string{"enp1s0"}}}
		})
		writeFile(t, k, "etc/fstab", "/dev/vda / ext4 defaults 0 1\n")
		if err := applyAll(k, many); err != nil {
			t.Fatal(err)
		}
		if err := newManager(t, k, Options{}).Protect(); err != nil {
			t.Fatal(err)
		}
		return k
	}
	planned := func(text string, o Options) func(*Manager) (any, error) {
		return func(m *Manager) (any, error) {
			m.options = o
			items, err := m.Plan(parse(t, text))
			var out []string
			for _, i := range items {
				if i.Err != nil && i.State == Refused {
					return nil, i.Err
				}
				out = append(out, fmt.Sprint(i.Name, i.State, i.Notes, bind.Commands(i.Steps), i.Words()))
			}
			return out, err
		}
	}
	described := func(s *hostfile.Host, notes any, err error) (any, error) {
		if err != nil {
			return nil, err
		}
		yaml, err := s.YAML(nil)
		return fmt.Sprint(string(yaml), notes), err
	}
	device := func(m *Manager, name string) *iommu.Device {
		d, err := m.topology.Find(mustParse(t, name))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}

	const early = "devices: [{select: path=0000:00:08.0/01.0, initramfs: true}]\n"
	type looks map[string]func(*Manager) (any, error)
	onImporter, onApplied := looks{}, looks{
		"adopt": func(m *Manager) (any, error) {
			s, _, err := m.Adopt() // what there is beside names, which may be missing
			return described(s, nil, err)
		},
		"plan": planned(many, Options{}),
		"unmanaged": planned(strings.ReplaceAll(many, "driver: home", "driver: home, network: unmanaged"),
			Options{}),
		"another plan": planned(strings.ReplaceAll(many, "vlan: 7", "vlan: 8, mac: stable"), Options{}),
		"other drivers": planned(strings.NewReplacer("driver: vfio, vlan: 7, trust: on", "driver: home",
			"driver: home", "driver: vfio").Replace(many), Options{}),
		"leased": planned(many, Options{Leased: func() (map[iommu.Address]Guest, error) {
			return map[iommu.Address]Guest{mustParse(t, "0000:01:10.0"): {}}, nil
		}}),
		"boot": planned("pfs:\n  - {each: [\"8086:10c9\"], count: 3}\nprotect: ["+nic+"]\n", Options{Boot: true}),
		"pool": func(m *Manager) (any, error) {
			vfs, err := m.Pool(parse(t, strings.ReplaceAll(many, "driver: vfio", "driver: vfio, pool: net")), "net")
			return len(vfs), err
		},
		"pool of": func(m *Manager) (any, error) {
			return m.PoolOf(parse(t, strings.ReplaceAll(many, "driver: vfio", "driver: vfio, pool: net")),
				device(m, "0000:01:10.0"))
		},
		"each by number":      planned("pfs:\n  - {each: [\"mac=52:54:00:00:00:01\"], count: 3}\n", Options{}),
		"protected by number": planned("devices:\n  - select: "+nic+"\nprotect: [mac=52:54:00:00:00:01]\n", Options{}),
		"protected": func(m *Manager) (any, error) {
			return protection(m, parse(t, "pfs: []\nprotect: [mac=52:54:00:00:00:01]\n"), device(m, pf))
		},
		"pool by number": func(m *Manager) (any, error) {
			s := parse(t, "pfs:\n  - {each: [\"mac=52:54:00:00:00:01\"], count: 3, vfs: [{range: 0-2, pool: net}]}\n")
			vfs, err := m.Pool(s, "net")
			return len(vfs), err
		},
		"pool of, by number": func(m *Manager) (any, error) {
			s := parse(t, "pfs:\n  - {each: [\"mac=52:54:00:00:00:01\"], count: 3, vfs: [{range: 0-2, pool: net}]}\n")
			return m.PoolOf(s, device(m, "0000:01:10.0"))
		},
		"taken": func(m *Manager) (any, error) {
			all, err := m.Taken(parse(t, "devices: [{select: "+nic+"}]\n"))
			return len(all), err
		},
		"saved":     func(m *Manager) (any, error) { return m.Saved(device(m, nic)) },
		"held":      func(m *Manager) (any, error) { return m.Held() },
		"last":      func(m *Manager) (any, error) { all, known, err := m.Last(); return []any{all, known}, err },
		"initramfs": func(m *Manager) (any, error) { return m.Initramfs(parse(t, early)) },
	}
	for _, source := range Sources() {
		onImporter[source] = func(m *Manager) (any, error) { return described(m.Import(source)) }
	}
	undone := sweptHost(t)
	if err := Of(&iommu.Host{Host: undone.Host()}).Undone(); err != nil {
		t.Fatal(err)
	}
	interrupted := sweptHost(t)
	if err := Of(&iommu.Host{Host: interrupted.Host()}).run.Put(applying+pf, before{}); err != nil {
		t.Fatal(err)
	}
	inUse := applied()
	inUse.Process(4713, "qemu", "/dev/vfio/devices/"+filepath.Base(oneFile(t, inUse, "0000:01:10.0/vfio-dev/*")))
	givenBack, moved := applied(), applied()
	if err := givenBack.Write("sys/bus/pci/drivers/vfio-pci/unbind", nic); err != nil {
		t.Fatal(err)
	}
	m := Of(&iommu.Host{Host: moved.Host()})
	match := parse(t, few).PFs[0].Select
	was, err := m.remembered(match)
	if err != nil || was == nil {
		t.Fatal(was, err)
	}
	was.Identity.Path, was.Identity.MACs = "0000:00:1f.0/00.0", nil // it may be another one
	if err := m.state.Put(knownKey(match.String()), was); err != nil {
		t.Fatal(err)
	}
	// Nothing but their places tells these two apart, of which one was elsewhere.
	disk := "devices: [{select: path=0000:00:02.0/00.0}]\n"
	equal := hosttest.NewKernel(t, hosttest.TakenDisks())
	m = newManager(t, equal, Options{})
	k, err := m.knownOf(plan(t, m, disk)[0])
	k.Equal = []string{"0000:00:02.0/00.0", "0000:00:1f.0/00.0"}
	if err := errors.Join(err, m.state.Put(knownKey("path=0000:00:02.0/00.0"), k)); err != nil {
		t.Fatal(err)
	}
	overdue := sweptHost(t)
	token, _, err := newManager(t, overdue, Options{}).Tries(parse(t, few), time.Nanosecond, false)
	if err != nil {
		t.Fatal(err)
	}
	checked := func(m *Manager) (any, error) {
		items, err := m.Plan(parse(t, strings.ReplaceAll(many, "vlan: 7", "vlan: 8")))
		if err != nil {
			return nil, err
		}
		m.Check(items)
		for _, i := range items {
			if i.Err != nil && !errors.Is(i.Err, holder.ErrRefused) {
				return nil, i.Err
			}
			if i.Err != nil {
				return "refused", nil
			}
		}
		return "free", nil
	}
	for k, all := range map[*hosttest.Kernel]looks{
		importer(): onImporter, applied(): onApplied,
		undone:      {"held": func(m *Manager) (any, error) { return m.Held() }},
		interrupted: {"interrupted": func(m *Manager) (any, error) { return m.Interrupted() }},
		inUse:       {"checked": checked},
		overdue: {
			"due": func(m *Manager) (any, error) { return m.Due(token) },
			"not confirmed": func(m *Manager) (any, error) {
				late, which, force, err := m.AwaitConfirmed()
				return []any{late, which, force}, err
			},
		},
		givenBack: {"given back": planned(many, Options{})},
		moved:     {"moved": planned(many, Options{})},
		equal:     {"equal": planned(disk, Options{})},
	} {
		for name, look := range all {
			failsInTurn(t, k, name, look)
		}
	}
}

// oneFile is the one file below the devices that a pattern matches.
func oneFile(t *testing.T, k *hosttest.Kernel, pattern string) string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(k.Dir(), "sys/bus/pci/devices", pattern))
	if err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	return all[0]
}

// failsInTurn lets each operation of a look fail that another call leads to than those before.
func failsInTurn(t *testing.T, k *hosttest.Kernel, name string, look func(*Manager) (any, error)) {
	t.Helper()
	m := newManager(t, k, Options{})
	defer m.handle.Close()
	var want any
	var err error
	fresh := again(t, m)
	all := k.Operations(func() { want, err = look(fresh) })
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	for _, n := range hosttest.Sample(all, thisPackage) {
		m := again(t, m)
		failed := k.FailNth(n, failures[n%3])
		got, err := look(m)
		k.Revive()
		told := strings.Contains(fmt.Sprint(got), "could not be read")
		if err == nil && !told && !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %s fails with %v, and it finds %v\nnot %v", name, failed(), failures[n%3], got, want)
		}
	}
}
