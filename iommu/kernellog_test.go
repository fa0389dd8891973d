package iommu

import (
	"reflect"
	"testing"
	"time"

	"viaduct/internal/host/hosttest"
)

// Lines of the kernel's log keep their times, from a running host through a snapshot; a snapshot of before that has none.
func TestKernelLog(t *testing.T) {
	k := hosttest.NewKernel(t, hosttest.Tree{})
	live := &Host{Host: k.Host()}
	old := "vfio-pci 0000:02:10.0: enabling device"
	snapshot := &Host{Host: hosttest.Tree{kernelLines: old +
		"\n[   12.500000] DMAR: IOMMU enabled\n[drm] 0000:03:00.0 is it\n"}.Host(t)}
	want := []LogLine{{old, -1}, {"DMAR: IOMMU enabled", 12500 * time.Millisecond}, {"[drm] 0000:03:00.0 is it", -1}}
	if got := KernelLog(snapshot); !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := KernelLines(snapshot); !reflect.DeepEqual(got, []string{want[0].Text, want[1].Text, want[2].Text}) {
		t.Errorf("without times: %v", got)
	}

	for _, l := range want {
		if again := parseLogLine(l.String()); again != l {
			t.Errorf("%q is read back as %v", l, again)
		}
	}

	if got := KernelLog(live); got != nil {
		t.Errorf("of a host without a log: %v", got)
	}

	for head, is := range map[string]time.Duration{
		"6,1,2500000,-": 2500 * time.Millisecond, "6,1,2500000,-,caller=T1": 2500 * time.Millisecond,
		"6,1": -1, "": -1, "6,1,-5,-": -1, "6,1,99999999999999999999,-": -1,
	} {
		if got := recordTime(head, 0); got != is {
			t.Errorf("%q: %v, want %v", head, got, is)
		}
	}

	if got := recordTime("6,1,1000000,-", time.Minute); got != 61*time.Second {
		t.Errorf("of a host that has slept: %v", got)
	}
}
