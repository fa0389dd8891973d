// Package vfio knows what the kernel makes of a device that a VFIO driver has: the nodes by which a virtual machine
// monitor opens it. Taking a device for VFIO and giving it back is package bind's, who uses one is package holder's.
package vfio
