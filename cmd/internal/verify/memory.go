package verify

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/guest"
	"viaduct/iommu"
	"viaduct/vfio"
)

// most is how much memory is mapped at most to take the time, in bytes.
const most = 1 << 30

// hugePage is the size of huge pages that are tried, in bytes.
const hugePage = 2 << 20

// hugeFolder has a folder for each size of huge pages.
const hugeFolder = "sys/kernel/mm/hugepages"

// allocate makes the memory that is mapped to take the time: of plain pages at most a GiB, and a quarter of what is
// free; of huge ones a quarter of what is free of them. The kernel gives it when it is used.
func (v *verification) allocate() error {
	available, err := memoryAvailable(v.host)
	if err != nil {
		return err
	}

	free, err := freeHuge(v.host, hugePage)
	if err != nil {
		return err
	}

	limit := available / 4
	if lock, may := guest.LockLimit(v.host, os.Getpid()); !may {
		limit = min(limit, lock/2)
	}

	for _, kind := range []struct {
		size uint64
		page int
	}{{min(most, limit) / hugePage * hugePage, 0}, {min(most, free*hugePage/4) / hugePage * hugePage, hugePage}} {
		if kind.size == 0 {
			continue
		}
		m, err := vfio.NewMemory(int(kind.size), kind.page)
		if errors.Is(err, unix.ENOMEM) {
			continue // somebody else was faster
		}
		if err != nil {
			return err
		}
		v.samples = append(v.samples, m)
		populate(m)
	}

	if len(v.samples) == 0 {
		v.note("there is not enough free memory to map some of it")
	} else if free < 4 {
		v.note("no huge pages of 2 MiB are reserved (vm.nr_hugepages), so mapping them was not timed")
	}

	return nil
}

// populate has the kernel give memory, in pages of the size that it is to have: it makes plain ones into huge ones else
// where it may.
func populate(m *vfio.Memory) {
	if m.PageSize() != hugePage {
		_ = unix.Madvise(m.Bytes(), unix.MADV_NOHUGEPAGE) // EINVAL where it never does
	}
	if unix.Madvise(m.Bytes(), unix.MADV_POPULATE_WRITE) == nil {
		return
	}
	// A kernel before 5.14.
	for b := m.Bytes(); len(b) > 0; b = b[min(len(b), m.PageSize()):] {
		b[0] = 1
	}
}

// measure takes the time that each memory takes to be mapped and unmapped.
func (w *Way) measure(c *vfio.Context, samples []*vfio.Memory) error {
	w.Mapping = []Timing{}
	for _, m := range samples {
		if err := w.measureOne(c, m); err != nil {
			return err
		}
	}
	return nil
}

func (w *Way) measureOne(c *vfio.Context, m *vfio.Memory) error {
	size := uint64(m.Size())
	iova, ok := place(w.ranges, size)
	if !ok {
		return fmt.Errorf("the IOMMU has no free range of %#x bytes: %w", size, vfio.ErrRange)
	}

	start := time.Now()
	if err := c.Map(vfio.Mapping{IOVA: iova, Memory: m, Access: vfio.ReadWrite}); err != nil {
		return err
	}
	mapped := time.Now()
	if err := c.Unmap(iova, size); err != nil {
		return err
	}
	end := time.Now()
	w.Mapping = append(w.Mapping, Timing{
		uint64(m.PageSize()), size, mapped.Sub(start).Nanoseconds(), end.Sub(mapped).Nanoseconds(),
	})
	return nil
}

// place is where in ranges so many bytes can be mapped, at a multiple of a huge page. Where the kernel tells no ranges,
// it is where every machine has memory.
func place(ranges []vfio.Range, size uint64) (uint64, bool) {
	if ranges == nil {
		return 1 << 30, true
	}
	for _, r := range ranges {
		first := (r.First + hugePage - 1) / hugePage * hugePage
		if first >= r.First && first <= r.Last && r.Last-first >= size-1 {
			return first, true
		}
	}
	return 0, false
}

// memoryAvailable is how much memory can be had without pushing others out, in bytes.
func memoryAvailable(h *iommu.Host) (uint64, error) {
	text, err := h.String("proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("read read read read read read read how much memory is available: %w", err)
	}
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kib, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 44)
			return kib << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo does not say how much memory is available")
}

// freeHuge is how many huge pages of a size are free and promised to nobody.
func freeHuge(h *iommu.Host, size uint64) (uint64, error) {
	dir := path.Join(hugeFolder, fmt.Sprintf("hugepages-%dkB", size>>10))
	if has, err := h.Has(dir); err != nil || !has {
		return 0, err
	}
	var n [2]uint64
	for i, name := range []string{"free_hugepages", "resv_hugepages"} {
		text, err := h.String(path.Join(dir, name))
		if err != nil {
			return 0, err
		}
		if n[i], err = strconv.ParseUint(text, 10, 40); err != nil {
			return 0, err
		}
	}
	return n[0] - min(n[0], n[1]), nil
}

// memory says whether a guest's memory can be mapped and locked.
func (v *verification) memory(size uint64) {
	m := &Memory{Size: size, HugePages: []Huge{}, Missing: []string{}}
	v.report.Memory = m
	v.fits(m)
	if limit, may := guest.LockLimit(v.host, os.Getpid()); !may {
		m.LockLimit = &limit
		if limit <= size {
			v.reason("this process may lock %d MiB of memory, and VFIO locks all %d MiB of the guest's: "+
				"raise ulimit -l, or LimitMEMLOCK= of its unit", limit>>20, size>>20)
		}
	} else {
		v.note("a VMM that does not run as root must be allowed to lock %d MiB and some more (ulimit -l, "+
			"LimitMEMLOCK=)",
			size>>20)
	}

	names, _ := v.host.Names(hugeFolder)
	for _, n := range names {
		kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(n, "hugepages-"), "kB"), 10, 40)
		if err != nil {
			continue
		}
		if free, err := freeHuge(v.host, kib<<10); err == nil {
			m.HugePages = append(m.HugePages, Huge{kib << 10, free, free*(kib<<10) >= size})
		}
	}
	slices.SortFunc(m.HugePages, func(a, b Huge) int { return cmp.Compare(a.Size, b.Size) })
}

// fits compares where a guest has its memory with what the IOMMU can map, by the way that works.
func (v *verification) fits(m *Memory) {
	layout := guest.Layout(runtime.GOARCH, m.Size, false)
	m.Ranges = spans(layout)
	for _, way := range []vfio.Way{vfio.IOMMUFD, vfio.Container} {
		w := v.report.Ways[way]
		if !w.OK || w.ranges == nil {
			continue
		}
		missing := notIn(w.ranges, layout)
		if moved := guest.Layout(runtime.GOARCH, m.Size, true); len(missing) > 0 && len(notIn(w.ranges, moved)) == 0 {
			m.Ranges, missing = spans(moved), nil
			v.note("the guest's memory fits only if its VMM avoids the range that AMD IOMMUs reserve, " +
				"e.g. QEMU with an AMD CPU model")
		}
		m.OK = new(len(missing) == 0)
		for _, r := range missing {
			m.Missing = append(m.Missing, r.String())
		}
		if len(missing) > 0 {
			v.reason("the guest's memory would lie where the IOMMU cannot map any: %s; give the guest less memory",
				strings.Join(m.Missing, ", "))
		}
		return
	}
}

func notIn(ranges, wanted []vfio.Range) []vfio.Range {
	var out []vfio.Range
	for _, r := range wanted {
		out = append(out, vfio.Missing(ranges, r)...)
	}
	return out
}
