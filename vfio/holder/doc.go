// Package holder finds out who uses a device in a way that must not be cut off: processes and guests that have it open,
// file systems and swap on its disks, addresses and routes of its network interfaces, the display, and other tools that
// have it in their books. It changes nothing.
//
// What there is to find is a table of kinds, see [Kinds]. [Find] looks for all of them on a running host; of a captured
// one it says what [Capture] saw there. Who may not see everything gets an error that is [ErrBlind], beside what could
// be seen: then nobody may be taken for absent who was not seen.
package holder
