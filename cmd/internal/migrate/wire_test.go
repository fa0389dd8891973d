package migrate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"viaduct/cmd/internal/vmm"
	"viaduct/sriov"
)

// empty is a host that has nothing, and counts what is changed on it.
type empty struct {
	record  *Record
	changes int
}

func (e *empty) Facts(context.Context, *FactsWish) (*FactsAnswer, error) {
	return &FactsAnswer{Facts: &Facts{}}, nil
}
func (e *empty) Record(string) (*Record, error)         { return e.record, nil }
func (e *empty) Save(r *Record) error                   { e.changes++; e.record = r; return nil }
func (e *empty) Drop(string) error                      { e.changes++; e.record = nil; return nil }
func (e *empty) Reserve(context.Context, *Record) error { e.changes++; return nil }
func (e *empty) Leased(string) (bool, error)            { return e.record != nil, nil }
func (e *empty) Socket(*Record) string                  { return "/nowhere/socket" }
func (e *empty) Start(context.Context, *Record) error {
	return errors.New("nothing can be started here")
}
func (e *empty) End(context.Context, *Record) error               { return nil }
func (e *empty) Alive(*Record) bool                               { return false }
func (e *empty) Address(string) (string, error)                   { return "", nil }
func (e *empty) SetAddress(context.Context, string, string) error { e.changes++; return nil }
func (e *empty) Device(*Record) (map[string]any, error)           { return nil, nil }
func (e *empty) Stay(context.Context, *Record) error              { e.changes++; return nil }
func (e *empty) Release(context.Context, string) error            { e.changes++; return nil }

const hello = `{"viaduct_migrate":1}` + "\n"

var anID = strings.Repeat("ab", 16)

// output is what the other side is told: its greeting may still be on its way when a conversation that never began ends.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func said(t *testing.T, house Guesthouse, text string) (answers []Answer, err error) {
	t.Helper()
	var out output
	err = (&Server{House: house, Version: "test"}).Serve(t.Context(), strings.NewReader(text), &out)
	for i, l := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		if i == 0 || l == "" {
			continue
		}
		var a Answer
		if err := json.Unmarshal([]byte(l), &a); err != nil {
			t.Fatalf("%q: %v", l, err)
		}
		answers = append(answers, a)
	}
	return answers, err
}

// What no viaduct asks is refused, and changes nothing.
func TestDistrust(t *testing.T) {
	question := func(do, move, guest string, body any) string {
		b, _ := json.Marshal(body)
		q, _ := json.Marshal(Question{Number: 1, Do: do, Move: move, Guest: guest, Body: b})
		return hello + string(q) + "\n"
	}

	good := Order{Way: ByFailover, From: "net", Count: 1, Address: theAddress}
	order := func(change func(*Order)) Order {
		o := good
		change(&o)
		return o
	}

	for name, text := range map[string]string{
		"no id":               question("reserve", "1", "web", good),
		"an id that is a way": question("reserve", "../../../../etc/passwd/00000000", "web", good),
		"no guest":            question("reserve", anID, "", good),
		"a guest that is one": question("reserve", anID, "../web", good),
		"unknown":             question("burn", anID, "web", nil),
		"a way":               question("reserve", anID, "web", order(func(o *Order) { o.Way = "ship" })),
		"no devices":          question("reserve", anID, "web", order(func(o *Order) { o.Count = 0 })),
		"many devices":        question("reserve", anID, "web", order(func(o *Order) { o.Count = 1 << 30 })),
		"a pool of control":   question("reserve", anID, "web", order(func(o *Order) { o.From = "net\x1b[2J" })),
		"a setting": question("reserve", anID, "web",
			order(func(o *Order) { o.Settings = sriov.Settings{"vlan": "9999"} })),
		"an early address": question("reserve", anID, "web",
			order(func(o *Order) { o.Settings = sriov.Settings{"mac": theAddress} })),
		"an address of many": question("reserve", anID, "web",
			order(func(o *Order) { o.Address = "ff:ff:ff:ff:ff:ff" })),
		"an address of none": question("reserve", anID, "web",
			order(func(o *Order) { o.Address = "00:00:00:00:00:00" })),
		"many words": question("reserve", anID, "web", order(func(o *Order) {
			o.Words = make([]string,
				1<<16)
		})),
		"a word that ends": question("reserve", anID, "web", order(func(o *Order) { o.Words = []string{"a\x00b"} })),
		"out of order":     question("take", anID, "web", nil),
		"plug first":       question("arrive", anID, "web", nil),
		"no JSON":          hello + "help\n",
		"no greeting":      "help\n",
		"another version":  `{"viaduct_migrate":2}` + "\n" + question("reserve", anID, "web", good),
		"the end":          hello + `{"number":1,"do":"reser`,
	} {
		e := &empty{}
		answers, err := said(t, e, text)
		if e.changes > 0 {
			t.Errorf("%s: %d changes", name, e.changes)
		}
		if err == nil && (len(answers) != 1 || answers[0].Error == "") {
			t.Errorf("%s: %+v", name, answers)
		}
	}

	// And what one asks is done, and let go of when nobody waits for it any more.
	e := &empty{}
	answers, err := said(t, e, question("reserve", anID, "web", good))
	if err != nil || len(answers) != 1 || answers[0].Error != "" || e.record.Phase != Refused {
		t.Errorf("%+v, %v, %+v", answers, err, e.record)
	}
}

// A line that is longer than any is not kept.
func TestLongLine(t *testing.T) {
	var l = newLine(endless{}, io.Discard)
	var g greeting
	if err := l.read(&g); err == nil || !strings.Contains(err.Error(), "longer than any") {
		t.Error(err)
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 'x'
	}
	return len(b), nil
}

// Whatever comes from the other side, nobody panics or hangs.
func FuzzServe(f *testing.F) {
	order, _ := json.Marshal(Order{Way: ByVFIO, From: "net", Count: 1, Words: []string{"qemu"},
		VM: vmm.Machine{CPU: "host"}})
	f.Add([]byte(hello + `{"number":1,"do":"reserve","move":"` + anID + `","guest":"web","body":` + string(order) +
		"}\n"))
	f.Add([]byte(hello + `{"number":1,"do":"facts","body":{}}` + "\n" + `{"number":2,"do":"clock"}` + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		_ = (&Server{House: &empty{}, Version: "test"}).Serve(t.Context(), bytes.NewReader(text), io.Discard)
	})
}

// FuzzAnswer is the source's side.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte(hello + `{"number":1,"peer":"waiting","body":{"now":"2026-01-01T00:00:00Z"}}` + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Converse(t.Context(), struct {
			io.Reader
			io.Writer
			io.Closer
		}{bytes.NewReader(text), io.Discard, io.NopCloser(nil)}, "test")
		if err != nil {
			return
		}
		var out Times
		_, _ = p.Ask(t.Context(), &Question{Do: askLook}, nil, &out)
	})
}
