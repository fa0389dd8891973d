package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"viaduct/cmd/viaduct-kube/internal/node"
)

// metrics are what was done and what there is, in the text format of Prometheus (exposition_formats.md).
type metrics struct {
	mu      sync.Mutex
	done    map[[2]string]int   // by what and result
	seconds map[string]float64  // by what
	there   map[[2]string]int   // functions, by pool and provider
	leased  map[[2]string]int   // the same, that somebody has
	wrong   map[node.Reason]int // functions, by what is wrong
	reasons []node.Reason
}

func newMetrics() *metrics {
	return &metrics{done: map[[2]string]int{}, seconds: map[string]float64{}, reasons: node.Reasons()}
}

// count counts something that was done.
func (m *metrics) count(what, result string, took time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done[[2]string{what, result}]++
	m.seconds[what] += took.Seconds()
}

// see counts what there is.
func (m *metrics) see(functions []node.Function, s *node.Settings) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.there, m.leased, m.wrong = map[[2]string]int{}, map[[2]string]int{}, map[node.Reason]int{}
	for i := range functions {
		f := &functions[i]
		of := [2]string{f.Pool, string(s.Provider(f.Pool))}
		m.there[of]++
		if f.Lease != nil {
			m.leased[of]++
		}
		for _, p := range f.Wrong {
			m.wrong[p.Reason]++
		}
	}
}

func (m *metrics) write(w io.Writer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	pairs := func(name, kind, help, one, two string, values map[[2]string]int) {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
		order := func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }
		for _, k := range slices.SortedFunc(maps.Keys(values), order) {
			fmt.Fprintf(w, "%s{%s=%q,%s=%q} %d\n", name, one, k[0], two, k[1], values[k])
		}
	}
	pairs("viaduct_operations_total", "counter", "What was done, by how it ended.", "operation", "result", m.done)
	fmt.Fprint(w, "# HELP viaduct_operation_seconds_total How long that took.\n"+
		"# TYPE viaduct_operation_seconds_total counter\n")
	for _, what := range slices.Sorted(maps.Keys(m.seconds)) {
		fmt.Fprintf(w, "viaduct_operation_seconds_total{operation=%q} %g\n", what, m.seconds[what])
	}
	pairs("viaduct_functions", "gauge", "Functions that the cluster may be given.", "pool", "provider", m.there)
	pairs("viaduct_functions_leased", "gauge", "Functions that somebody has.", "pool", "provider", m.leased)
	fmt.Fprint(w, "# HELP viaduct_functions_wrong Functions of which something is wrong.\n"+
		"# TYPE viaduct_functions_wrong gauge\n")
	for _, r := range m.reasons {
		fmt.Fprintf(w, "viaduct_functions_wrong{reason=%q} %d\n", r, m.wrong[r])
	}
}
