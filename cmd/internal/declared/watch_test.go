package declared

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// told are events at moments of a clock that goes as fast as nothing waits.
type told struct {
	began time.Time
	at    []time.Duration
}

// Await waits as that of uevent does: for a second at most.
func (e *told) Await(ctx context.Context, most time.Duration) bool {
	if ctx.Err() != nil {
		return false
	}
	end := time.Since(e.began) + min(most, time.Second)
	if len(e.at) == 0 || e.at[0] > end {
		time.Sleep(end - time.Since(e.began))
		return false
	}
	time.Sleep(e.at[0] - time.Since(e.began))
	e.at = e.at[1:]
	return true
}

const ms = time.Millisecond

// each is so many moments, one after the other.
func each(from, step time.Duration, n int) (out []time.Duration) {
	for i := range n {
		out = append(out, from+time.Duration(i)*step)
	}
	return out
}

// watch looks at once, when things are quiet after an event or have not been for long, each minute, and after a look
// that failed ever more seldom, whatever happens.
func TestWatchClock(t *testing.T) {
	const minute = time.Minute
	for name, c := range map[string]struct {
		events []time.Duration
		fails  func(look int) bool
		until  time.Duration
		want   []time.Duration
	}{
		"nothing happens": {nil, nil, 150 * time.Second, []time.Duration{0, minute, 2 * minute}},
		"an event": {[]time.Duration{10 * time.Second}, nil, 80 * time.Second,
			[]time.Duration{0, 10500 * ms, 70500 * ms}},
		"events of one thing": {each(10*time.Second, 400*ms, 5), nil, minute, []time.Duration{0, 12100 * ms}},
		"never quiet": {each(10*time.Second, 100*ms, 1000), nil, 16 * time.Second,
			[]time.Duration{0, 12000 * ms, 14100 * ms}},
		"looks that fail": {
			nil, func(int) bool { return true }, 200 * time.Second,
			[]time.Duration{0, 1000 * ms, 3000 * ms, 7000 * ms, 15000 * ms, 31000 * ms, 63000 * ms, 123000 * ms,
				183000 * ms},
		},
		"looks that fail and make events": {
			each(100*ms, 100*ms, 1000), func(int) bool { return true }, 10 * time.Second,
			[]time.Duration{0, 1000 * ms, 3000 * ms, 7000 * ms},
		},
		"some that fail": {
			nil, func(look int) bool { return look != 2 }, 65 * time.Second,
			[]time.Duration{0, 1000 * ms, 3000 * ms, 63000 * ms, 64000 * ms},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				ctx, stop := context.WithTimeout(t.Context(), c.until)
				defer stop()
				var looks []time.Duration
				watch(ctx, &told{began, c.events}, func() bool {
					looks = append(looks, time.Since(began))
					return c.fails != nil && c.fails(len(looks)-1)
				})
				if !slices.Equal(looks, c.want) {
					t.Errorf("it looked at %v, not at %v", looks, c.want)
				}
				if late := time.Since(began) - c.until; late > time.Second {
					t.Errorf("it ended %v after it was told to", late)
				}
			})
		})
	}
}

// settle looks again as long as something comes within two seconds, and ends where that is for good.
func TestSettleClock(t *testing.T) {
	for name, c := range map[string]struct {
		events []time.Duration
		want   []time.Duration
		end    time.Duration
	}{
		"nothing happens": {nil, []time.Duration{0}, 2 * time.Second},
		"an event":        {[]time.Duration{500 * ms}, []time.Duration{0, 500 * ms}, 2500 * ms},
		"a late one":      {[]time.Duration{1500 * ms}, []time.Duration{0, 1500 * ms}, 3500 * ms},
		"too late":        {[]time.Duration{2100 * ms}, []time.Duration{0}, 2 * time.Second},
		"never quiet":     {each(100*ms, 100*ms, 100), each(0, 100*ms, 30), 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				var looks []time.Duration
				settle(t.Context(), &told{began, c.events}, func() { looks = append(looks, time.Since(began)) })
				if !slices.Equal(looks, c.want) || time.Since(began) != c.end {
					t.Errorf("it looked at %v, not at %v, and ended after %v", looks, c.want, time.Since(began))
				}
			})
		})
	}
}
