package qmp_test

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"viaduct/cmd/internal/qmp"
	"viaduct/cmd/internal/qmp/qmptest"
)

// The client and a real QEMU: an answer of hundreds of kilobytes, events, a second client, and the end.
func TestReal(t *testing.T) {
	q := qmptest.Start(t, filepath.Join(t.TempDir(), "qmp"), "-machine", "q35,accel=tcg", "-m", "64M", "-S")
	c := q.Dial(t)
	if c.PID != q.Cmd.Process.Pid {
		t.Errorf("it is process %d, not %d", c.PID, q.Cmd.Process.Pid)
	}
	var schema []struct{ Name string }
	if err := c.Do(t.Context(), "query-qmp-schema", nil, &schema); err != nil || len(schema) < 500 {
		t.Fatalf("%d entries, %v", len(schema), err)
	}
	var status struct{ Status string }
	if err := c.Do(t.Context(), "query-status", nil, &status); err != nil || status.Status != "prelaunch" {
		t.Errorf("%+v, %v", status, err)
	}

	mark := c.Mark()
	if err := c.Do(t.Context(), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	if e, err := c.Await(t.Context(), mark, func(e qmp.Event) bool { return e.Name == "RESUME" }); err != nil ||
		e.Time.IsZero() {
		t.Errorf("%+v, %v", e, err)
	}

	refused, _ := errors.AsType[*qmp.Error](c.Do(t.Context(), "device_del", map[string]string{"id": "nothing"}, nil))
	if refused == nil || refused.Class != "DeviceNotFound" {
		t.Errorf("%+v", refused)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if second, err := qmp.Dial(ctx, q.Socket); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second client: %v, %v", second, err)
	}

	if err := c.Do(t.Context(), "quit", nil, nil); err != nil {
		t.Error(err)
	}
	if _, err := c.Await(t.Context(), c.Mark(), func(qmp.Event) bool { return false }); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("at the end: %v", err)
	}
}
