// Package vfio opens devices through VFIO and drives them: the kernel's interface, whole enough to write a driver in
// user space with. Taking a device for VFIO and giving it back is package bind's, who uses one is package holder's.
//
// A [Context] is an address space for DMA, by either way into VFIO: iommufd with a device's own node, or a container
// with the node of its group. [Ways] says which of them a host has for a device. [Context.Open] opens devices in it,
// and [Context.Map] maps [Memory] for them, at addresses that [Context.Info] allows. Of a [Device] there are
//
//   - regions: [Device.Region] reads and writes configuration space and BARs, [Region.Map] maps them, for single loads
//     and stores of registers that fail, and do not end the process, when the device does not answer;
//   - interrupts: [Device.Interrupts] enables vectors, which are waited for with a context. Request is signalled when
//     the host wants the device back;
//   - resets: [Device.Reset] alone, [Device.HotReset] together with all that shares its bus;
//   - migration: [Device.Save] and [Device.Load], or each state by itself with [Device.SetState]; and what was written
//     to meanwhile, by the IOMMU ([Context.Dirty]) or the device ([Device.Log]).
//
// What the host or the device cannot do is an [ErrUnsupported], found by trying and not by the kernel's version. Other
// errors that a caller can act on are the Err constants; beside them, [Error] has the ioctl, the file and the errno.
//
// The program in example/nvmeid reads the identity of an NVMe controller. The facts are those of linux/vfio.h and
// linux/iommufd.h; where the kernel's code decides what an errno means, the comments name its file.
package vfio
