package sriov

import (
	"encoding/binary"
	"reflect"
	"testing"
)

// primaryPage is what a controller answers with: the pools at 32 (queues) and 64 (interrupts).
func primaryPage(q, v pool) []byte {
	b := make([]byte, identifyLength)
	b[4] = 3
	for at, p := range map[int]pool{32: q, 64: v} {
		binary.LittleEndian.PutUint32(b[at:], p.Total)
		binary.LittleEndian.PutUint16(b[at+8:], uint16(p.Primary))
		binary.LittleEndian.PutUint16(b[at+12:], uint16(p.Most))
		binary.LittleEndian.PutUint16(b[at+14:], uint16(p.Unit))
	}
	return b
}

func secondaryPage(all []secondary) []byte {
	b := make([]byte, identifyLength)
	b[0] = byte(len(all))
	for i, s := range all {
		e := b[(i+1)*32:]
		binary.LittleEndian.PutUint16(e, s.ID)
		if s.Online {
			e[4] = 1
		}
		binary.LittleEndian.PutUint16(e[8:], uint16(s.VF))
		binary.LittleEndian.PutUint16(e[10:], uint16(s.Has[queues]))
		binary.LittleEndian.PutUint16(e[12:], uint16(s.Has[interrupts]))
	}
	return b
}

func controllers(n int, q, v uint32) []secondary {
	var out []secondary
	for i := range n {
		out = append(out, secondary{ID: uint16(i + 1), VF: i + 1, Has: map[resource]uint32{queues: q, interrupts: v}})
	}
	return out
}

func TestDecodeNVMe(t *testing.T) {
	q, v := pool{16, 3, 2, 1}, pool{9, 1, 4, 2}
	pools, err := decodePrimary(primaryPage(q, v))
	if err != nil || pools[queues] != q || pools[interrupts] != v {
		t.Errorf("%+v, %v", pools, err)
	}
	want := controllers(3, 2, 1)
	want[1].Online = true
	if got := decodeSecondary(secondaryPage(want)); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// Pages that are shorter than what they are to hold say nothing, and the first of them is an error.
func TestShortPages(t *testing.T) {
	whole := primaryPage(pool{16, 3, 2, 1}, pool{9, 1, 4, 2})
	if pools, err := decodePrimary(whole[:79]); err == nil {
		t.Errorf("%+v of 79 bytes", pools)
	}
	list := secondaryPage(controllers(3, 2, 1))
	for size, want := range map[int]int{0: 0, 31: 0, 32: 0, 64: 1, 127: 2, 128: 3} {
		if got := decodeSecondary(list[:size]); len(got) != want {
			t.Errorf("%d controllers of %d bytes, want %d", len(got), size, want)
		}
	}
}

func TestShareOut(t *testing.T) {
	pools := map[resource]pool{queues: {Total: 16, Most: 8, Unit: 1}, interrupts: {Total: 8, Most: 8, Unit: 1}}
	got, err := shareOut(pools, controllers(8, 0, 0), 4)
	want := []action{
		{1, assign, queues, 4}, {2, assign, queues, 4}, {3, assign, queues, 4}, {4, assign, queues, 4},
		{1, assign, interrupts, 2}, {2, assign, interrupts, 2}, {3, assign, interrupts, 2}, {4, assign, interrupts, 2},
	}

	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v\nwant %v", got, err, want)
	}

	has := controllers(8, 2, 1) // of eight, to four: first those that get none give theirs back
	got, err = shareOut(pools, has, 4)
	want = []action{
		{5, assign, queues, 0}, {6, assign, queues, 0}, {7, assign, queues, 0}, {8, assign, queues, 0},
		{5, assign, interrupts, 0}, {6, assign, interrupts, 0}, {7, assign, interrupts, 0}, {8, assign, interrupts, 0},
		{1, assign, queues, 4}, {2, assign, queues, 4}, {3, assign, queues, 4}, {4, assign, queues, 4},
		{1, assign, interrupts, 2}, {2, assign, interrupts, 2}, {3, assign, interrupts, 2}, {4, assign, interrupts, 2},
	}

	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v\nwant %v", got, err, want)
	}
	if got, err = shareOut(pools, has, 8); err != nil || len(got) != 0 {
		t.Errorf("what is right already: %v, %v", got, err)
	}

	pools[queues] = pool{Total: 16, Primary: 2, Most: 8, Unit: 4}
	if got, err = shareOut(pools, has, 4); err == nil {
		t.Errorf("units of 4 for three and a half each: %v", got)
	}

	if got := goOnline([]secondary{{ID: 1, VF: 1, Online: true}, {ID: 2, VF: 2}, {ID: 3, VF: 3}},
		2); !reflect.DeepEqual(
		got,
		[]action{{Controller: 2, Act: online}},
	) {
		t.Errorf("online: %v", got)
	}
}

func FuzzNVMe(f *testing.F) {
	f.Add(primaryPage(pool{16, 0, 2, 1}, pool{8, 0, 1, 1}), 8)
	f.Add(secondaryPage(controllers(3, 2, 1)), 3)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		pools, err := decodePrimary(b)
		if err != nil {
			return
		}
		all := decodeSecondary(b)
		if len(all) > len(b)/32 {
			t.Errorf("%d controllers of %d bytes", len(all), len(b))
		}
		actions, err := shareOut(pools, all, n)
		if err != nil {
			return
		}
		for _, a := range actions {
			if p := pools[a.Resource]; a.Count > p.Most || a.Count > p.Total {
				t.Errorf("%v of %+v", a, p)
			}
		}
	})
}
