// Package uapi holds the numbers and structures of the kernel's interfaces VFIO and iommufd, by the names that they
// have in linux/vfio.h and linux/iommufd.h; a structure's name is the C one in Go's spelling. hack/uapi-check compares
// every number, size and offset with the headers of the lab's kernel. What a header may lack, as it is newer, is marked
// with "newer".
//
// The structures hold no pointers, and are laid out as C does on 64-bit machines. On a 32-bit one the package does not
// compile.
package uapi

// The ioctls of both are _IO(';', n), without a size or a direction (VFIO_TYPE, IOMMUFD_TYPE).
const (
	vfioIO  = ';'<<8 | 100
	iommuIO = ';'<<8 | 0x80
)
