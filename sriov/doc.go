// Package sriov makes and removes virtual functions (VFs) of a physical function (PF), and sets what a PF decides for
// them.
//
// A [Handle], which [Open] gives, is one of package bind that also finishes or undoes interrupted changes of VFs.
// [Handle.Make] gives a PF so many VFs, each with a driver and settings; [Handle.SetVF] sets one VF. Both lock what
// they change, refuse to end VFs that somebody uses, read back what came of it, and put back what failed. Who wants to
// see first what would be done makes a plan and carries that out: [Handle.PlanCount], [Handle.CheckCount] and
// [Handle.Apply], or [Handle.PlanSet] and [Handle.Set]. What an interrupted run had left is told by
// [bind.Handle.Recovered].
//
// What there is to set is a table: see [Keys] and [ParseSettings].
package sriov
