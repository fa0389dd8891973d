package hosttest

import (
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// Operation is one that a program asks of the host: the calls that led to it; none of one that is asked for elsewhere,
// by the child that writes or at the other end of a socket.
type Operation []uintptr

// Operations are what a program asks of the host, in order.
func (k *Kernel) Operations(run func()) []Operation {
	var mu sync.Mutex
	var all []Operation
	k.SetFault(func(op, _ string) error {
		var calls Operation
		if op != "message" && op != "write" {
			calls = make(Operation, 100)
			calls = calls[:runtime.Callers(2, calls)]
		}
		mu.Lock()
		defer mu.Unlock()
		all = append(all, calls)
		return nil
	})
	run()
	k.Revive()
	return all
}

// Sample are the numbers of some operations, such that each call that leads to any leads to one of them. With
// VIADUCT_SWEEP=short it is a few of these, seeded, and those that calls in some packages lead to; with
// VIADUCT_SWEEP=all it is all operations.
func Sample(all []Operation, always ...string) []int {
	var out, kept []int
	led := map[uintptr]bool{}
	for n, calls := range all {
		fresh := freshCalls(led, calls)
		if len(calls) == 0 || len(fresh) > 0 || os.Getenv("VIADUCT_SWEEP") == "all" {
			out = append(out, n)
		}
		if anyIn(fresh, always) {
			kept = append(kept, n)
		}
	}
	if os.Getenv("VIADUCT_SWEEP") == "short" {
		seeded := rand.New(rand.NewPCG(uint64(len(all)), 0))
		seeded.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
		out = append(out[:min(len(out), 16)], kept...)
		slices.Sort(out)
		out = slices.Compact(out)
	}
	return out
}

// SampleOf is a smaller sample: each call in one package that leads to any operation leads to one of them, and of what
// is asked for elsewhere it is every third.
func SampleOf(pkg string, all []Operation) []int {
	if os.Getenv("VIADUCT_SWEEP") != "" {
		return Sample(all, pkg)
	}
	var out []int
	led := map[uintptr]bool{}
	elsewhere := 0
	for n, calls := range all {
		take := anyIn(freshCalls(led, calls), []string{pkg})
		if len(calls) == 0 {
			take = elsewhere%3 == 0
			elsewhere++
		}
		if take {
			out = append(out, n)
		}
	}
	return out
}

// freshCalls are the calls that led to no operation before.
func freshCalls(led map[uintptr]bool, calls Operation) []uintptr {
	fresh := slices.DeleteFunc(slices.Clone(calls), func(call uintptr) bool { return led[call] })
	for _, call := range fresh {
		led[call] = true
	}
	return fresh
}

// anyIn reports whether one of some calls is in one of some packages.
func anyIn(calls []uintptr, pkgs []string) bool {
	return slices.ContainsFunc(calls, func(call uintptr) bool {
		of := runtime.FuncForPC(call - 1)
		return of != nil && slices.ContainsFunc(pkgs, func(pkg string) bool { return strings.HasPrefix(of.Name(), pkg+".") })
	})
}

// EveryNth are some of a sample, all with VIADUCT_SWEEP=all, for what takes long to prepare.
func EveryNth(nth int, sample []int) []int {
	if os.Getenv("VIADUCT_SWEEP") == "all" {
		return sample
	}
	var out []int
	for i := 0; i < len(sample); i += nth {
		out = append(out, sample[i])
	}
	return out
}

// FailNth has the n-th operation fail, counted from 0, and no other; failed names it, "" if there were not so many.
// Revive ends that.
func (k *Kernel) FailNth(n int, err error) (failed func() string) {
	return k.atNth(n, func() error { return err })
}

// InterruptNth has something done at the n-th operation, counted from 0, which succeeds; at names it, "" if there were
// not so many. Revive ends that.
func (k *Kernel) InterruptNth(n int, interrupt func()) (at func() string) {
	return k.atNth(n, func() error {
		interrupt()
		return nil
	})
}

func (k *Kernel) atNth(n int, do func() error) (name func() string) {
	var at atomic.Pointer[string]
	var left atomic.Int64
	left.Store(int64(n))
	k.SetFault(func(op, name string) error {
		if left.Add(-1) != -1 {
			return nil
		}
		what := op + " " + name
		at.Store(&what)
		return do()
	})
	return func() string {
		if what := at.Load(); what != nil {
			return *what
		}
		return ""
	}
}
