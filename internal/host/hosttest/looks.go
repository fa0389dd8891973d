package hosttest

import (
	"reflect"
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
	for n := 0; ; n++ {
		failed := k.FailNth(n, syscall.EIO)
		got, err := look()
		k.Revive()
		if failed() == "" {
			return
		}
		if err == nil && !reflect.DeepEqual(got, want) {
			tb.Errorf("%s: %s fails, and it finds without an error %+v, not %+v", what, failed(), got, want)
		}
	}
}
