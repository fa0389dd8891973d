// Package bind takes devices from the host's drivers and gives them back.
//
// A [Handle], which [Open] gives, owns all that this takes: the journal of what was changed, the locks that keep other
// processes away, and the child process that writes. [Handle.Move] is all that most programs need. [Handle.Prepare]
// finds what goes along with a device, locks it, finishes what interrupted runs left of it, and asks who uses it; the
// [Job] that it returns says what is refused and why, and does the rest. What is printed of a plan ([Handle.Plan]) is
// what is done. After every change the kernel's own files are read to see whether it took, and what failed is put back
// as it was.
//
// What Move is made of is there by itself for packages that change something else of a device too, as sriov does:
// [Handle.Lock], [Handle.Recover], [Handle.Check], [Handle.Do], and [Handle.Begin], [Handle.Write] and [Handle.End].
// What is called without its predecessor fails with [ErrNotLocked], [ErrUnasked] or [ErrNotBegun].
//
// A write to sysfs may block for as long as a guest has the device, and cannot be cut off. It is made in a child
// process of the same program, so every program that changes devices has to begin with
//
//	func main() {
//		if bind.ServeWrites() {
//			return
//		}
//		...
//	}
//
// A change that was interrupted, by a signal that kills or a loss of power, is finished or undone by the next
// [Handle.Prepare] of the device, by [Handle.Recover], or by the command viaduct recover.
package bind
