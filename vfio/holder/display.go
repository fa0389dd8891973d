package holder

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/internal/host"
	"viaduct/internal/shell"
	"viaduct/iommu"
)

// Displays finds the display that the firmware began with and active framebuffers. A device without a driver
// counts too: the console may be on its memory. Then it is of no use to a guest either, as VFIO cannot have that.
func Displays(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	if len(devices) == 0 {
		return nil, nil
	}
	var out []Holder
	var frames map[string]string
	screens, blind := readScreens(h)
	if blind != nil && !errors.Is(blind, ErrBlind) {
		return nil, blind
	}
	for _, d := range devices {
		if !d.PCI || d.PhysFn != nil {
			continue
		}
		add := func(brief, format string, a ...any) {
			out = append(out, Holder{Device: d.Name, Kind: Display, What: fmt.Sprintf(format, a...), Brief: brief})
		}
		on, err := screens.on(h, d)
		if err != nil {
			return nil, err
		}
		if on != "" {
			add("boot screen", "has the screen's framebuffer (%s) on its memory: boot with "+
				"initcall_blacklist=sysfb_init, or end it with %s", on, screens.end)
		}
		if d.VFIO {
			continue
		}
		if frames == nil {
			if frames, err = framebuffers(h); err != nil {
				return nil, err
			}
		}
		// Also of a display on USB, which is below a controller.
		if fb := frames[d.Name]; fb != "" && !d.IsBridge() {
			add("console", "has the active framebuffer %s", fb)
		}
		if d.Class>>16 != 3 {
			continue
		}

		for _, file := range []string{"boot_vga", "boot_display"} {
			boot, err := h.Steady(path.Join(devicePath(d.Address), file))
			if err != nil && !host.Absent(err) {
				return nil, err
			}
			if boot == "1" {
				add("boot display", "is the display this host started on")
				break
			}
		}
	}
	return out, blind
}

// framebuffers are the framebuffers of a host by the names of all devices that they are below.
func framebuffers(h *iommu.Host) (map[string]string, error) {
	const class = "sys/class/graphics"
	names, err := h.Names(class)
	if err != nil && !host.Absent(err) {
		return nil, err
	}

	out := map[string]string{}
	for _, n := range names {
		if !strings.HasPrefix(n, "fb") {
			continue
		}
		target, err := h.Link(path.Join(class, n))
		if host.Absent(err) || errors.Is(err, errNoLink) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for part := range strings.SplitSeq(target, "/") {
			out[part] = n
		}
	}
	return out, nil
}

// screen is memory that the firmware's framebuffer is in.
type screen struct {
	from, to uint64 // to is the last address
	name     string
}

type screens struct {
	all []screen
	end string // the command that ends it
}

// screenNames are what the kernel calls the memory of a framebuffer that the firmware made, and drivers of such
// framebuffers (drivers/firmware/sysfb_simplefb.c, drivers/firmware/google/framebuffer-coreboot.c,
// drivers/gpu/drm/sysfb, drivers/video/fbdev).
var screenNames = []string{
	"BOOTFB", "Coreboot Framebuffer", "simpledrm", "simplefb", "simple-framebuffer", "efifb", "efidrm", "vesafb",
	"vesadrm", "ofdrm", "offb",
}

// readScreens finds the memory of the framebuffers that the firmware made and something still shows the console on. A
// plain user is shown no addresses.
func readScreens(h *iommu.Host) (screens, error) {
	var out screens
	devices, err := names(h, "sys/bus/platform/devices")
	if err != nil {
		return out, err
	}
	platform := ""
	for _, n := range devices {
		if strings.Contains(n, "-framebuffer.") {
			platform = n
		}
	}
	driver, err := h.LinkBase(path.Join("sys/bus/platform/devices", platform, "driver"))
	if err != nil && !host.Absent(err) && !errors.Is(err, errNoLink) {
		return out, err
	}
	out.end = "echo NAME > /sys/bus/platform/drivers/DRIVER/unbind for it"
	if platform != "" && driver != "" {
		out.end = fmt.Sprintf("echo %s > %s", shell.Quote(platform),
			shell.Quote("/sys/bus/platform/drivers/"+driver+"/unbind"))
	}

	memory, err := h.Read("proc/iomem")
	if host.Absent(err) {
		return out, nil
	}
	if err = unseen("proc/iomem", err); err != nil {
		return out, err
	}
	hidden := false
	for line := range strings.Lines(string(memory)) {
		from, to, name, ok := parseResource(line)
		if !ok || !slices.Contains(screenNames, name) {
			continue
		}
		if hidden = hidden || to == 0; to > 0 {
			out.all = append(out.all, screen{from, to, name})
		}
	}
	if hidden {
		return out, fmt.Errorf("%w: /proc/iomem shows no addresses, and there is a framebuffer", ErrBlind)
	}

	if platform != "" && driver != "" && len(out.all) == 0 {
		// Some drivers of such framebuffers claim no memory.
		data, err := h.Read("sys/kernel/boot_params/data")
		if err != nil && !host.Absent(err) {
			return out, unseen("sys/kernel/boot_params/data", err)
		}
		if s, ok := screenOf(data); ok {
			s.name = driver
			out.all = append(out.all, s)
		}
	}
	return out, nil
}

// parseResource reads a line of /proc/iomem: START-END : NAME.
func parseResource(line string) (from, to uint64, name string, ok bool) {
	area, name, ok := strings.Cut(strings.TrimSpace(line), " : ")
	low, high, both := strings.Cut(area, "-")
	from, err1 := strconv.ParseUint(low, 16, 64)
	to, err2 := strconv.ParseUint(high, 16, 64)
	return from, to, name, ok && both && err1 == nil && err2 == nil
}

// screenOf reads where the firmware's framebuffer is from the boot parameters, which begin with a struct screen_info
// (include/uapi/linux/screen_info.h).
func screenOf(bootParams []byte) (screen, bool) {
	if len(bootParams) < 0x40 {
		return screen{}, false
	}
	u16, u32 := binary.LittleEndian.Uint16, binary.LittleEndian.Uint32
	height, line := uint64(u16(bootParams[0x14:])), uint64(u16(bootParams[0x24:]))
	// VIDEO_CAPABILITY_64BIT_BASE
	base := uint64(u32(bootParams[0x18:]))
	if u32(bootParams[0x36:])&2 != 0 {
		base |= uint64(u32(bootParams[0x3a:])) << 32
	}
	size := height * line
	return screen{from: base, to: base + size - 1}, base != 0 && size != 0
}

// on is the framebuffer that lies on a device's memory; "" if none does.
func (s screens) on(h *iommu.Host, d *iommu.Device) (string, error) {
	if len(s.all) == 0 {
		return "", nil
	}
	resources, err := h.String(path.Join(devicePath(d.Address), "resource"))
	if host.Absent(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}

	for line := range strings.Lines(resources) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		from, err1 := strconv.ParseUint(f[0], 0, 64)
		to, err2 := strconv.ParseUint(f[1], 0, 64)
		if err1 != nil || err2 != nil || to <= from {
			continue
		}
		for _, screen := range s.all {
			if screen.from <= to && from <= screen.to {
				return screen.name, nil
			}
		}
	}
	return "", nil
}
