package hosttest

import (
	"reflect"
	"sync/atomic"
	"syscall"
	"testing"
)

// EachFailure lets each operation of a look at the kernel's host fail in turn. The look, which changes nothing, must
// tell of it with an error, or have found what it finds without.
func EachFailure(tb testing.TB, k *Kernel, what string, look func() (any, error)) {
	tb.Helper()
	want, err := look()
	if err != nil {
		tb.Errorf("%s: %v", what, err)
		return
	}
	for n := int64(0); ; n++ {
		failed := atomic.Pointer[string]{}
		var left atomic.Int64
		left.Store(n)
		k.SetFault(func(op, name string) error {
			if left.Add(-1) == -1 {
				at := op + " " + name
				failed.Store(&at)
				return syscall.EIO
			}
			return nil
		})
		got, err := look()
		k.Revive()
		at := failed.Load()
		if at == nil {
			return
		}
		if err == nil && !reflect.DeepEqual(got, want) {
			tb.Errorf("%s: %s fails, and it finds without an error %+v, not %+v", what, *at, got, want)
		}
	}
}
