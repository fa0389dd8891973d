//go:build amd64 && !race && !msan && !asan

package vfio

import (
	"sync/atomic"
	"unsafe"
)

// Loads that the compiler puts into their callers: an atomic one is one MOV, which it neither drops nor merges. It has
// no such store: an atomic one is an XCHG, which reads as well. With -race and the like it would have its own code make
// the load, and a fault there ends the process.

func inline32(p unsafe.Pointer) uint32 { return atomic.LoadUint32((*uint32)(p)) }
func inline64(p unsafe.Pointer) uint64 { return atomic.LoadUint64((*uint64)(p)) }
