package sriov

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/shell"
	"viaduct/iommu"
)

// A VF of an NVMe controller is a secondary controller, which works only once it has queues and interrupts, given to it
// by commands of the primary one, and is online (NVM Express Base Specification 2.0, 8.26). Numbers here are that
// specification's.

const nvmeClass = 0x010802

// resource is a kind of what a primary controller shares with its VFs.
type resource uint32

const (
	queues     resource = 0 // VQ: submission and completion queue pairs, the one for administration among them
	interrupts resource = 1 // VI
)

var resourceNames = map[resource]string{queues: "queues", interrupts: "interrupts"}

// pool is what a primary controller has of a resource to share.
type pool struct {
	Total   uint32 // flexible in all
	Primary uint32 // of these, its own until it is reset
	Most    uint32 // for one VF
	Unit    uint32 // is given in multiples of
}

// decodePrimary reads the primary controller capabilities (Identify, CNS 14h).
func decodePrimary(b []byte) (map[resource]pool, error) {
	if len(b) < 80 {
		return nil, fmt.Errorf("NVMe primary controller capabilities of %d bytes", len(b))
	}
	at := func(o int) pool {
		// VQFRT, VQRFA, VQRFAP, VQPRT, VQFRSM, VQGRAN.
		return pool{
			Total: binary.LittleEndian.Uint32(b[o:]), Primary: uint32(binary.LittleEndian.Uint16(b[o+8:])),
			Most: uint32(binary.LittleEndian.Uint16(b[o+12:])), Unit: uint32(binary.LittleEndian.Uint16(b[o+14:])),
		}
	}
	pools := map[resource]pool{}
	if b[4]&1 != 0 {
		// CRT: what it shares at all.
		pools[queues] = at(32)
	}
	if b[4]&2 != 0 {
		pools[interrupts] = at(64)
	}
	return pools, nil
}

// secondary is one of the controllers that VFs are.
type secondary struct {
	ID     uint16
	Online bool
	VF     int // from 1
	Has    map[resource]uint32
}

// decodeSecondary reads the secondary controller list (Identify, CNS 15h): at most 127 a page.
func decodeSecondary(b []byte) []secondary {
	const entry = 32
	var out []secondary
	if len(b) < entry {
		return nil
	}
	for i := range int(b[0]) {
		e := b[min((i+1)*entry, len(b)):]
		if len(e) < entry {
			break
		}
		word := func(o int) uint16 { return binary.LittleEndian.Uint16(e[o:]) }
		out = append(out, secondary{
			ID: word(0), Online: e[4]&1 != 0, VF: int(word(8)),
			Has: map[resource]uint32{queues: uint32(word(10)), interrupts: uint32(word(12))},
		})
	}
	return out
}

// action is one Virtualization Management command (opcode 1Ch).
type action struct {
	Controller uint16
	Act        uint32 // offline, assign or online
	Resource   resource
	Count      uint32
}

const (
	offline = 7
	assign  = 8
	online  = 9
)

func (a action) command(device string) string {
	s := fmt.Sprintf("nvme virt-mgmt %s -c %d -a %d", shell.Quote("/dev/"+device), a.Controller, a.Act)
	if a.Act == assign {
		s += fmt.Sprintf(" -r %d -n %d", a.Resource, a.Count)
	}
	return s
}

// share is how much of a resource each of n VFs gets: all get the same.
func (p pool) share(n int) uint32 {
	each := min((p.Total-min(p.Primary, p.Total))/uint32(max(n, 1)), p.Most)
	return each - each%max(p.Unit, 1)
}

// shareOut plans what n VFs get: first what the others have is taken back, then each gets its share. What is right
// already is left alone; a VF must be offline for a change, which the kernel's making of VFs sees to. It fails if a VF
// would get less than it works with: a queue pair beside that for administration, and an interrupt.
func shareOut(pools map[resource]pool, all []secondary, n int) ([]action, error) {
	var take, give []action
	for _, r := range []resource{queues, interrupts} {
		if _, shared := pools[r]; !shared {
			continue
		}
		each := pools[r].share(n)
		if least := map[resource]uint32{queues: 2, interrupts: 1}[r]; each < least {
			return nil, fmt.Errorf("%d VFs would get %d %s each and need %d: the controller has %d to share, and "+
				"%d for itself"+
				" (nvme virt-mgmt -a 1 and a reset of the controller free these)",
				n, each, resourceNames[r], least, pools[r].Total, pools[r].Primary)
		}

		for _, s := range all {
			want := each
			if s.VF > n || s.VF < 1 {
				want = 0
			}
			a := action{s.ID, assign, r, want}
			switch {
			case s.Has[r] > want:
				take = append(take, a)
			case s.Has[r] < want:
				give = append(give, a)
			}
		}
	}
	return append(take, give...), nil
}

// goOnline are the commands that let the first n VFs begin.
func goOnline(all []secondary, n int) []action {
	var out []action
	for _, s := range all {
		if s.VF >= 1 && s.VF <= n && !s.Online {
			out = append(out, action{Controller: s.ID, Act: online})
		}
	}
	return out
}

// nvmePF is a PF's NVMe controller, opened for its administration commands. Its owner closes it.
type nvmePF struct {
	host *iommu.Host
	name string
	fd   int
}

// openNVMe opens the controller of a PF whose VFs need resources; nil for any other device, and on a captured host.
func openNVMe(h *iommu.Host, pf *iommu.Device) (*nvmePF, error) {
	if pf.Class != nvmeClass || pf.Driver != "nvme" || !h.Live() {
		return nil, nil
	}
	names, err := h.Names(path.Join("sys/bus/pci/devices", pf.Name, "nvme"))
	if host.Absent(err) || err == nil && len(names) == 0 {
		return nil, fmt.Errorf("%s: its controller is not ready: the driver nvme has made no device for it", pf.Name)
	}
	if err != nil {
		return nil, err
	}
	fd, err := h.OpenNode("dev/"+names[0], unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	return &nvmePF{h, names[0], fd}, nil
}

func (c *nvmePF) close() { unix.Close(c.fd) }

// passthru is struct nvme_passthru_cmd (include/uapi/linux/nvme_ioctl.h).
type passthru struct {
	Opcode, Flags  uint8
	_              uint16
	NSID           uint32
	CDW2, CDW3     uint32
	Metadata, Addr uint64
	MetadataLen    uint32
	DataLen        uint32
	CDW10, CDW11   uint32
	_              [4]uint32
	TimeoutMS      uint32
	Result         uint32
}

const (
	ioctlAdmin      = 0xc0484e41 // NVME_IOCTL_ADMIN_CMD: _IOWR('N', 0x41, struct nvme_passthru_cmd)
	opIdentify      = 0x06
	opVirtManage    = 0x1c
	identifyLength  = 4096
	primaryCaps     = 0x14
	secondaryList   = 0x15
	adminTimeout    = 10_000 // ms
	perSecondPage   = 127
	secondaryFromID = 16 // the lowest controller of a page, in the upper half of CDW10
)

// nvmeStatus is the status code and its type, as a controller answers.
type nvmeStatus uint16

const invalidField nvmeStatus = 0x002 // also of commands for capabilities that a controller has not

func (s nvmeStatus) Error() string { return fmt.Sprintf("NVMe status %#x", uint16(s)) }

// admin makes one administration command. It returns an nvmeStatus if the controller refused it.
func (c *nvmePF) admin(cmd *passthru) error {
	cmd.TimeoutMS = adminTimeout
	status, err := c.host.Ioctl(c.fd, "dev/"+c.name, ioctlAdmin, unsafe.Pointer(cmd))
	if err != nil {
		return err
	}
	if status != 0 {
		// Without the bits "more" and "do not retry".
		return nvmeStatus(status & 0x7ff)
	}
	return nil
}

func (c *nvmePF) identify(what, from uint32) ([]byte, error) {
	b := make([]byte, identifyLength)
	cmd := passthru{
		Opcode: opIdentify, Addr: uint64(uintptr(unsafe.Pointer(&b[0]))), DataLen: identifyLength,
		CDW10: what | from<<secondaryFromID,
	}
	err := c.admin(&cmd)
	runtime.KeepAlive(b)
	if err != nil {
		return nil, fmt.Errorf("/dev/%s: identify %#x: %w", c.name, what, err)
	}
	return b, nil
}

// secondaries are all controllers that VFs are, or can be.
func (c *nvmePF) secondaries() ([]secondary, error) {
	var all []secondary
	for from := uint32(0); ; {
		b, err := c.identify(secondaryList, from)
		if err != nil {
			return nil, err
		}
		page := decodeSecondary(b)
		all = append(all, page...)
		if len(page) < perSecondPage || uint32(page[len(page)-1].ID) < from {
			return all, nil
		}
		from = uint32(page[len(page)-1].ID) + 1
	}
}

func (c *nvmePF) do(actions []action) error {
	for _, a := range actions {
		cmd := passthru{
			Opcode: opVirtManage,
			CDW10:  a.Act | uint32(a.Resource)<<8 | uint32(a.Controller)<<16,
			CDW11:  a.Count,
		}
		if err := c.admin(&cmd); err != nil {
			return fmt.Errorf("%s: %w", a.command(c.name), err)
		}
		if a.Act == assign && cmd.Result != a.Count {
			return fmt.Errorf("%s: it took %d", a.command(c.name), cmd.Result)
		}
	}
	return nil
}

// planShares plans the resources of n new VFs. A controller that does not share any has its VFs ready as they are.
func planShares(h *iommu.Host, pf *iommu.Device, n int) (name string, actions []action, err error) {
	c, err := openNVMe(h, pf)
	if c == nil {
		return "", nil, err
	}
	defer c.close()
	b, err := c.identify(primaryCaps, 0)
	if errors.Is(err, invalidField) {
		return "", nil, nil
	}
	if err != nil {
		return "", nil, err
	}

	pools, err := decodePrimary(b)
	if err != nil || len(pools) == 0 {
		return "", nil, err
	}
	all, err := c.secondaries()
	if err != nil {
		return "", nil, err
	}
	if actions, err = shareOut(pools, all, n); err != nil {
		return "", nil, fmt.Errorf("%s: %w", pf.Name, err)
	}
	return c.name, actions, nil
}

// doShares carries out what planShares planned.
func doShares(h *iommu.Host, pf *iommu.Device, actions []action) error {
	if len(actions) == 0 {
		return nil
	}
	c, err := openNVMe(h, pf)
	if c == nil {
		return err
	}
	defer c.close()
	return c.do(actions)
}

// setOnline lets the first n VFs of a PF begin, and reads back that they have what works.
func setOnline(h *iommu.Host, pf iommu.Address, n int) error {
	d, err := iommu.ReadDevice(h, pf)
	if err != nil {
		return err
	}
	c, err := openNVMe(h, &d)
	if c == nil {
		return err
	}
	defer c.close()
	all, err := c.secondaries()
	if err != nil || len(all) == 0 {
		return err
	}

	if err := c.do(goOnline(all, n)); err != nil {
		return err
	}
	if all, err = c.secondaries(); err != nil {
		return err
	}
	if left := goOnline(all, n); len(left) > 0 {
		return fmt.Errorf("%s: %d of its VFs did not come online", pf, len(left))
	}
	return nil
}
