package guest

import (
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// TestLockLimit: what a process may lock, by its limit, and by CAP_IPC_LOCK where the kernel counts that.
func TestLockLimit(t *testing.T) {
	const (
		limited = "Limit                     Soft Limit           Hard Limit           Units\n" +
			"Max locked memory         8388608              8388608              bytes\n"
		unlimited = "Max locked memory         unlimited            unlimited            bytes\n"
		none      = "Name:\tqemu\nCapEff:\t0000000000000000\n"
		lock      = "Name:\tqemu\nCapEff:\t0000000000004000\n"
		first     = "-> user:[4026531837]"
		another   = "-> user:[4026532301]"
	)

	for name, c := range map[string]struct {
		tree  hosttest.Tree
		limit uint64
		may   bool
	}{
		"limited":            {hosttest.Tree{"limits": limited, "status": none, "ns/user": first}, 8 << 20, false},
		"unlimited":          {hosttest.Tree{"limits": unlimited, "status": none, "ns/user": first}, 0, true},
		"capable":            {hosttest.Tree{"limits": limited, "status": lock, "ns/user": first}, 0, true},
		"capable in another": {hosttest.Tree{"limits": limited, "status": lock, "ns/user": another}, 8 << 20, false},
		"capable, by its map": {hosttest.Tree{"limits": limited, "status": lock, "uid_map": "0 0 4294967295\n"}, 0,
			true},
		"mapped, by its map": {hosttest.Tree{"limits": limited, "status": lock, "uid_map": "0 100000 65536\n"},
			8 << 20, false},
		"nothing can be known": {hosttest.Tree{}, 0, true},
	} {
		tree := hosttest.Tree{"proc/7/": ""}
		for file, content := range c.tree {
			tree["proc/7/"+file] = content
		}
		limit, may := LockLimit(&iommu.Host{Host: tree.Host(t)}, 7)
		if limit != c.limit || may != c.may {
			t.Errorf("%s: %d, %v", name, limit, may)
		}
	}
}
