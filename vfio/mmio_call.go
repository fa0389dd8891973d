//go:build !amd64 || race || msan || asan

package vfio

import "unsafe"

func inline32(p unsafe.Pointer) uint32 { return load32(p) }
func inline64(p unsafe.Pointer) uint64 { return load64(p) }
