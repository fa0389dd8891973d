package uevent

import (
	"context"
	"testing"
	"time"

	"viaduct/internal/host/hosttest"
)

// What happens is heard; where nothing does, waiting ends with its time or with the context.
func TestAwait(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	e, err := Open(k.Host())
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if e.Await(context.Background(), time.Millisecond) {
		t.Error("nothing happened, and was heard")
	}
	for range 2 {
		if err := k.Write("sys/bus/pci/drivers_probe", "0000:01:00.0"); err != nil {
			t.Fatal(err)
		}
		if !e.Await(context.Background(), time.Second) {
			t.Error("what happened was not heard")
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	began := time.Now()
	if e.Await(ctx, time.Hour) || time.Since(began) > 5*time.Second {
		t.Errorf("it waited %s", time.Since(began))
	}
}
