package sriov

import (
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// A driver may drop all that a VF without an address sends where spoofing is checked: that is told where VFs are made.
func TestSpoofCheckOfNoAddress(t *testing.T) {
	s := open(t, small(t))
	for _, c := range []struct {
		settings Settings
		note     bool
	}{
		{Settings{SpoofChk: on}, true}, {Settings{SpoofChk: on, MAC: StableMAC}, false},
		{Settings{SpoofChk: off}, false},
	} {
		p, err := s.PlanCount(device(t, s, pf), Wish{VFs: []VFWish{{Settings: c.settings}}})
		if err != nil || strings.Contains(strings.Join(p.Notes, " "), "without an address") != c.note {
			t.Errorf("%v: %v, notes %q", c.settings, err, p.Notes)
		}
	}
}

// A card whose firmware has SR-IOV off, which shows no VFs or no capability, comes with what turns it on.
func TestOffInFirmware(t *testing.T) {
	for id, says := range map[string]string{
		"8086:1572": "virtualization mode", "1022:1458": "SR-IOV support", "15b3:1021": "SRIOV_EN",
		"14e4:16d7": "bnxtnvm",
	} {
		for _, files := range []hosttest.Tree{
			nil, {"sriov_totalvfs": "0\n", "sriov_offset": "0\n", "sriov_stride": "0\n", "sriov_vf_device": "1572\n"},
		} {
			s := open(t, hosttest.NewKernel(t, hosttest.Made(
				hosttest.PCI{At: "0000:01:00.0", ID: id, Class: "020000", Driver: "it", Group: 1, Files: files},
			)))
			_, err := s.PlanCount(device(t, s, pf), Wish{VFs: make([]VFWish, 2)})
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s with %q: %v", id, files, err)
			}
		}
	}
}

// RDMA over Ethernet makes no InfiniBand of a NIC: without its network interface it is not ready, or that is said.
func TestRoCEWithoutInterface(t *testing.T) {
	roce := hosttest.RoCE().With(hosttest.Tree{"run/netns/blue": ""})
	s := open(t, hosttest.NewKernel(t, roce))
	wish := Wish{VFs: make([]VFWish, 2)}
	p, err := s.PlanCount(device(t, s, pf), wish)
	if err == nil || !strings.Contains(err.Error(), "has not made one") {
		t.Errorf("none: %v, %+v", err, p)
	}

	k := hosttest.NewKernel(t, roce)
	k.Net.Elsewhere = map[string][]hosttest.Elsewhere{"run/netns/blue": {{Name: "eth0", Device: pf}}}
	s = open(t, k)
	p, err = s.PlanCount(device(t, s, pf), wish)
	if err != nil || !strings.Contains(strings.Join(p.Notes, " "), "one (eth0) is in the network namespace of blue") {
		t.Errorf("elsewhere: %v, %+v", err, p)
	}
	guids := Wish{VFs: []VFWish{{Settings: Settings{NodeGUID: StableGUID, PortGUID: StableGUID}}}}
	_, err = s.PlanCount(device(t, s, pf), guids)
	if err == nil || !strings.Contains(err.Error(), "no InfiniBand GUID") {
		t.Errorf("GUIDs: %v", err)
	}
	err = CheckInterface(s.Host(), device(t, s, pf))
	if err == nil || !strings.Contains(err.Error(), "one (eth0) is in") {
		t.Errorf("as it is listed: %v", err)
	}
}

// Of a captured host without its interfaces nobody knows whether a NIC had one.
func TestInterfacesNotCaptured(t *testing.T) {
	const dir = "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/"
	s, err := Open(&iommu.Host{Host: hosttest.InfiniBand().With(hosttest.Tree{
		"sys/class": hosttest.Gone, dir + "infiniband": hosttest.Gone, dir + "sriov_drivers_autoprobe": "1\n",
		dir + "modalias": "pci:v000015B3d0000101Bsv00001AF4sd00001100bc02sc00i00\n",
	}).Host(t)}, bind.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p, err := s.PlanCount(device(t, s, pf), Wish{VFs: make([]VFWish, 2)})
	if err != nil || !strings.Contains(strings.Join(p.Notes, " "), "has no network interfaces of this host") {
		t.Errorf("%v, %+v", err, p)
	}
}
