package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}}, "capabilities": ["oob"]}}` + "\n"

// fake is a QEMU that greets and then answers each command by answer, which may write whatever it likes.
func fake(t *testing.T, answer func(conn net.Conn, id, command string)) *Client {
	t.Helper()
	ours, its := net.Pipe()
	go func() {
		defer its.Close()
		fmt.Fprint(its, greeting)
		for in := bufio.NewScanner(its); in.Scan(); {
			var c struct {
				Execute string
				ID      json.RawMessage
			}
			if json.Unmarshal(in.Bytes(), &c) != nil {
				return
			}
			if c.Execute == "qmp_capabilities" {
				fmt.Fprintf(its, `{"return": {}, "id": %s}`+"\n", c.ID)
				continue
			}
			answer(its, string(c.ID), c.Execute)
		}
	}()
	c, err := New(t.Context(), ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// An answer of any length arrives, and events between are kept; an error is QEMU's own words.
func TestDo(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	c := fake(t, func(conn net.Conn, id, command string) {
		switch command {
		case "long":
			fmt.Fprintf(conn, `{"timestamp": {"seconds": 1700000000, "microseconds": 5}, "event": "STOP"}`+"\n"+
				`{"return": %q, "id": %s}`+"\n", long, id)
		case "bad":
			fmt.Fprintf(conn, `{"error": {"class": "GenericError", "desc": "not so"}, "id": %s}`+"\n", id)
		}
	})
	mark := c.Mark()
	var out string
	if err := c.Do(t.Context(), "long", nil, &out); err != nil || out != long {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	e, err := c.Await(t.Context(), mark, func(e Event) bool { return e.Name == "STOP" })
	if err != nil || !e.Time.Equal(time.Unix(1700000000, 5000)) {
		t.Errorf("%+v, %v", e, err)
	}
	err = c.Do(t.Context(), "bad", nil, nil)
	if refused, ok := errors.AsType[*Error](err); !ok || refused.Desc != "not so" || refused.Command != "bad" {
		t.Errorf("%v", err)
	}
}

// Answers reach those that asked, in whatever order they come.
func TestOrder(t *testing.T) {
	var ids []string
	c := fake(t, func(conn net.Conn, id, _ string) {
		if ids = append(ids, id); len(ids) == 3 {
			for i := 2; i >= 0; i-- {
				fmt.Fprintf(conn, `{"return": %s, "id": %s}`+"\n", ids[i], ids[i])
			}
		}
	})
	seen := make(chan int, 3)
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			var n int
			if err := c.Do(t.Context(), "number", nil, &n); err != nil {
				t.Error(err)
			}
			seen <- n
		})
	}
	all.Wait()
	if a, b, c := <-seen, <-seen, <-seen; a == b || b == c || a == c {
		t.Errorf("%d, %d, %d: one answer reached two", a, b, c)
	}
}

// Who does not greet, greets wrongly, or stops in the middle is told of, and nobody waits for ever.
func TestBad(t *testing.T) {
	for name, text := range map[string]string{
		"no greeting": `{"return": {}}` + "\n", "no JSON": "hello\n", "cut": `{"QMP": {"ver`,
	} {
		ours, its := net.Pipe()
		go func() {
			fmt.Fprint(its, text)
			its.Close()
		}()
		if _, err := New(t.Context(), ours); err == nil {
			t.Errorf("%s: no error", name)
		}
	}

	ours, its := net.Pipe()
	defer its.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := New(ctx, ours); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silence: %v", err)
	}
}

// A QEMU that ends in the middle of an answer ends what waits, and what comes after.
func TestEnds(t *testing.T) {
	c := fake(t, func(conn net.Conn, id, _ string) {
		fmt.Fprintf(conn, `{"id": %s, "return": {"half`, id)
		conn.Close()
	})
	mark := c.Mark()
	if err := c.Do(t.Context(), "quit", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("the command: %v", err)
	}
	if _, err := c.Await(t.Context(), mark, func(Event) bool { return true }); !errors.Is(err, ErrClosed) {
		t.Errorf("an event: %v", err)
	}
	if err := c.Do(t.Context(), "again", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("a command afterwards: %v", err)
	}
}

// Who does not answer is waited for no longer than the context says; a late answer reaches nobody else.
func TestLate(t *testing.T) {
	asked := make(chan string, 1)
	var late string
	c := fake(t, func(conn net.Conn, id, command string) {
		if command == "never" {
			late = id
			asked <- id
			return
		}
		fmt.Fprintf(conn, `{"return": "late", "id": %s}`+"\n"+`{"return": "now", "id": %s}`+"\n", late, id)
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-asked
		cancel()
	}()
	if err := c.Do(ctx, "never", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	var out string
	if err := c.Do(t.Context(), "query", nil, &out); err != nil || out != "now" {
		t.Errorf("%q, %v", out, err)
	}
}

// More events than are kept do not grow without bound; the last are there.
func TestManyEvents(t *testing.T) {
	c := fake(t, func(conn net.Conn, id, _ string) {
		w := bufio.NewWriter(conn)
		for i := range 2 * mostEvents {
			fmt.Fprintf(w, `{"event": "E%d"}`+"\n", i)
		}
		fmt.Fprintf(w, `{"return": {}, "id": %s}`+"\n", id)
		w.Flush()
	})
	mark := c.Mark()
	if err := c.Do(t.Context(), "flood", nil, nil); err != nil {
		t.Fatal(err)
	}
	all := c.Since(mark)
	if len(all) > mostEvents || len(all) == 0 || all[len(all)-1].Name != fmt.Sprintf("E%d", 2*mostEvents-1) {
		t.Errorf("%d events are kept, the last %+v", len(all), all[len(all)-1])
	}
	if c.Mark() != mark+2*mostEvents {
		t.Errorf("the mark is %d", c.Mark())
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(greeting + `{"return": {}, "id": 1}` + "\n" + `{"event": "STOP", "data": {}}`))
	f.Add([]byte(`{"QMP": {}}{"id": null}{"error": {}, "id": 1}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		ours, its := net.Pipe()
		go func() {
			_, _ = its.Write(text)
			its.Close()
		}()
		go func() { // what it is asked
			for b := make([]byte, 512); ; {
				if _, err := its.Read(b); err != nil {
					return
				}
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c, err := New(ctx, ours)
		if err == nil {
			_ = c.Close()
		}
		if ctx.Err() != nil {
			t.Error("it hung")
		}
	})
}
