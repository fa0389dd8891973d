package changelog

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

func hostOf(t *testing.T) *iommu.Host {
	t.Helper()
	return &iommu.Host{Host: hosttest.Tree{"sys/kernel/x": "\n"}.Host(t)}
}

// What is appended side by side is all there, in lines of its own; a line that was cut is left out.
func TestAppend(t *testing.T) {
	h := hostOf(t)
	const each, workers = 40, 8
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				e := Of(bind.Event{Device: fmt.Sprintf("%d-%d", w, i), Subject: bind.Driver, From: "igb",
					To: "vfio-pci"})
				e.Time = time.Unix(int64(i+1), 0)
				if err := Append(h, e); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	f, err := os.OpenFile(h.Path(File), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"time":"2026-`); err != nil {
		t.Fatal(err)
	}
	f.Close()
	all, err := Read(h)
	if err != nil || len(all) != each*workers || all[0].Text() != "driver igb -> vfio-pci" {
		t.Errorf("%d entries, %v", len(all), err)
	}
}

// However much is written, two files of some size are kept, and the newest lines.
func TestBounded(t *testing.T) {
	h := hostOf(t)
	why := strings.Repeat("x", 8000)
	for i := range 300 {
		e := Of(bind.Event{Device: fmt.Sprint(i), Subject: bind.VFs, From: "0", To: "4", Err: errors.New(why)})
		e.Time = time.Now()
		if err := Append(h, e); err != nil {
			t.Fatal(err)
		}
	}
	files, _ := filepath.Glob(h.Path("var/lib/viaduct/*"))
	total := int64(0)
	for _, f := range files {
		st, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		total += st.Size()
		if st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %o", f, st.Mode())
		}
	}
	all, err := Read(h)
	if err != nil || len(files) != 2 || total > 2*most+20000 || len(all) == 0 || *all[len(all)-1].Device != "299" {
		t.Errorf("%d files of %d bytes, %d entries, %v", len(files), total, len(all), err)
	}
	if last := all[len(all)-1]; last.Result != Failed || last.Text() != "0 -> 4 VFs" {
		t.Errorf("%+v", last)
	}
}

func TestMessage(t *testing.T) {
	e := Of(bind.Event{Device: "0000:01:00.0", Subject: bind.Settings, To: "vlan=7", Err: errors.New("a\nb")})
	e.Command = "viaduct vf set"
	want := "MESSAGE=0000:01:00.0: vlan=7 (was none) (viaduct vf set): a; b\nPRIORITY=4\nSYSLOG_IDENTIFIER=viaduct\n" +
		"VIADUCT_COMMAND=viaduct vf set\nVIADUCT_RESULT=failed\nVIADUCT_DEVICE=0000:01:00.0\n"
	if got := string(e.message()); got != want {
		t.Errorf("%q\nwant %q", got, want)
	}
	if got := Command([]string{"viaduct", "run", "web", "--", "qemu", "secret"}); got != "viaduct run web -- ..." {
		t.Errorf("%q", got)
	}
}

// Whatever a file of a snapshot holds is read, and has a text.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"time":"2026-11-26T00:00:00Z","device":"0000:01:00.0","subject":"driver","from":null,"to":"vfio-pci","result":"done"}`))
	f.Add([]byte("{}\n{\"time\":"))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, e := range parse(text) {
			if e.Time.IsZero() || bytes.Contains(e.message(), []byte("\n\n")) {
				t.Errorf("%+v", e)
			}
			_ = e.Text()
		}
	})
}
