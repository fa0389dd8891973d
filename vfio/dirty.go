package vfio

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"math/bits"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
)

// Bitmap is which pages of a range devices have written to: a bit for each page, from the first on.
type Bitmap struct {
	Range
	Page  uint64 // size of a page in bytes
	Words []uint64
}

// maxBitmap is the most pages that one Bitmap has.
const maxBitmap = 1 << 31

// NewBitmap makes an empty Bitmap of a range in pages of a size, both of which bounds must be multiples of.
func NewBitmap(r Range, page uint64) (*Bitmap, error) {
	b := &Bitmap{Range: r, Page: page}
	words, err := b.need()
	if err != nil {
		return nil, err
	}
	b.Words = make([]uint64, words)
	return b, nil
}

// need is how many words the range takes.
func (b *Bitmap) need() (int, error) {
	r, page := b.Range, b.Page
	switch {
	case page == 0 || page&(page-1) != 0 || r.First%page != 0 || (r.Last+1)%page != 0:
		return 0, fmt.Errorf("vfio: bitmap of %s in pages of %#x: %w", r, page, ErrAlignment)
	case r.Last < r.First || r.Last-r.First == math.MaxUint64 || (r.Last-r.First)/page >= maxBitmap:
		return 0, fmt.Errorf("vfio: bitmap of %s in pages of %#x: %w", r, page, ErrRange)
	}
	return int((r.Last-r.First)/page/64) + 1, nil
}

// check refuses a bitmap that was changed so that the kernel would write beyond its words.
func (b *Bitmap) check() error {
	words, err := b.need()
	if err == nil && len(b.Words) < words {
		err = fmt.Errorf("vfio: bitmap of %s in pages of %#x has %d words and takes %d: %w",
			b.Range, b.Page, len(b.Words), words, ErrRange)
	}
	return err
}

// Pages are the addresses of the pages that were written to.
func (b *Bitmap) Pages() iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		for i, word := range b.Words {
			for ; word != 0; word &= word - 1 {
				if !yield(b.First + (uint64(i)*64+uint64(bits.TrailingZeros64(word)))*b.Page) {
					return
				}
			}
		}
	}
}

// Count is how many pages were written to.
func (b *Bitmap) Count() int {
	n := 0
	for _, word := range b.Words {
		n += bits.OnesCount64(word)
	}
	return n
}

// Clear makes it empty.
func (b *Bitmap) Clear() { clear(b.Words) }

// length is how many bytes the range has.
func (b *Bitmap) length() uint64 { return b.Last - b.First + 1 }

// pointer is the address of the words for the kernel, while pin is pinned.
func pointer[T any](pin *runtime.Pinner, s []T) uint64 {
	if len(s) == 0 {
		return 0
	}
	pin.Pin(&s[0])
	return uint64(uintptr(unsafe.Pointer(&s[0])))
}

// CanLog reports whether the device itself can note what memory it writes to: see [Device.StartLog].
func (d *Device) CanLog() (bool, error) {
	return d.hasFeature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, uapi.VFIO_DEVICE_FEATURE_SET)
}

// logMeans are what errnos of a device's log mean: too many ranges, or wrong ones.
var logMeans = map[unix.Errno]error{unix.E2BIG: ErrRange, unix.EINVAL: ErrRange}

// StartLog has the device note which pages of some ranges it writes to. It is asked for pages of a size in bytes, and
// returns which size it takes. It is an ErrUnsupported if it can note nothing.
func (d *Device) StartLog(page uint64, ranges []Range) (uint64, error) {
	raw := make([]uapi.VfioDeviceFeatureDmaLoggingRange, len(ranges))
	for i, r := range ranges {
		raw[i].Iova, raw[i].Length = r.First, r.Last-r.First+1
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	c := uapi.VfioDeviceFeatureDmaLoggingControl{
		PageSize: page, NumRanges: uint32(len(raw)), Ranges: pointer(&pin, raw),
	}
	if err := setFeature(d, uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, &c, logMeans); err != nil {
		return 0, err
	}
	return c.PageSize, nil
}

// StopLog ends it.
func (d *Device) StopLog() error {
	return d.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP|uapi.VFIO_DEVICE_FEATURE_SET, nil, logMeans)
}

// Log adds to a bitmap what pages the device has written to, and has it forget them.
func (d *Device) Log(b *Bitmap) error {
	if err := b.check(); err != nil {
		return err
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	r := uapi.VfioDeviceFeatureDmaLoggingReport{
		Iova: b.First, Length: b.length(), PageSize: b.Page, Bitmap: pointer(&pin, b.Words),
	}
	return getFeature(d, uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, &r)
}

// dirtyTracker is a space whose IOMMU can note what devices write to.
type dirtyTracker interface {
	track(on bool) error
	dirty(b *Bitmap, keep bool) error
}

func (c *Context) tracker(op string) (dirtyTracker, error) {
	if err := c.ready(op); err != nil {
		return nil, err
	}
	if t, ok := c.space.(dirtyTracker); ok && c.options.DirtyTracking {
		return t, nil
	}
	return nil, fmt.Errorf("vfio: %s: the context was made without DirtyTracking: %w", op, ErrUnsupported)
}

// TrackDirty has the IOMMU note, or note no more, what pages devices write to. The context has to be made with
// DirtyTracking: else it is an ErrUnsupported.
func (c *Context) TrackDirty(on bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	t, err := c.tracker("TrackDirty")
	if err != nil {
		return err
	}
	return t.track(on)
}

// Dirty adds to a bitmap what pages devices have written to since TrackDirty(true), and has the IOMMU forget them,
// unless they are to be kept. It is an ErrRefused while nothing is noted.
func (c *Context) Dirty(b *Bitmap, keep bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	t, err := c.tracker("Dirty")
	if err == nil {
		err = b.check()
	}
	if err != nil {
		return err
	}
	return t.dirty(b, keep)
}

func (s *iommufd) track(on bool) error {
	for i, table := range s.tables {
		err := s.trackTable(table, on)
		if err == nil {
			continue
		}
		// All of them, or none.
		for _, before := range s.tables[:i] {
			if on {
				err = errors.Join(err, s.trackTable(before, false))
			}
		}
		return err
	}
	s.tracks = on
	return nil
}

func (s *iommufd) trackTable(table uint32, on bool) error {
	a := uapi.IommuHwptSetDirtyTracking{
		Size: uint32(unsafe.Sizeof(uapi.IommuHwptSetDirtyTracking{})), HwptId: table,
	}
	if on {
		a.Flags = uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE
	}
	const op = "IOMMU_HWPT_SET_DIRTY_TRACKING"
	_, err := s.file.ioctl(op, uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, unsafe.Pointer(&a), nil)
	return err
}

func (s *iommufd) dirty(b *Bitmap, keep bool) error {
	if !s.tracks {
		return fmt.Errorf("vfio: Dirty: call TrackDirty(true) first: %w", ErrRefused)
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	a := uapi.IommuHwptGetDirtyBitmap{
		Size: uint32(unsafe.Sizeof(uapi.IommuHwptGetDirtyBitmap{})),
		Iova: b.First, Length: b.length(), PageSize: b.Page, Data: pointer(&pin, b.Words),
	}
	if keep {
		a.Flags = uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
	}
	for _, table := range s.tables {
		a.HwptId = table
		const op = "IOMMU_HWPT_GET_DIRTY_BITMAP"
		_, err := s.file.ioctl(op, uapi.IOMMU_HWPT_GET_DIRTY_BITMAP, unsafe.Pointer(&a), dirtyMeans)
		if err != nil {
			return err
		}
	}
	return nil
}

var dirtyMeans = map[unix.Errno]error{unix.EINVAL: ErrRange}
