package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"viaduct/cmd/internal/terminal"
	"viaduct/vfio/bind"
)

// progress shows how far changes are: "ens1f0 16/16 VFs, 9/16 set".
type progress struct {
	line *terminal.Progress

	mu    sync.Mutex
	order []string
	pfs   map[string]*pfProgress // by the PF's address
	other int                    // devices that are where they are to be
}

// pfProgress is how far a PF is.
type pfProgress struct {
	label                 string
	want, made, set, took int
}

// see shows what an event says.
func (p *progress) see(e bind.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := e.PF
	if e.Subject == bind.VFs {
		key = e.Device
	}
	of := p.pfs[key]
	switch {
	case e.Subject == bind.VFs && e.Begins:
		want, _ := strconv.Atoi(e.To)
		p.pfs[key] = &pfProgress{label: e.Label, want: want}
		p.order = append(p.order, key)
	case e.Subject == bind.VFs && e.Part && of != nil:
		of.made = of.want
	case e.Subject == bind.VFs:
		delete(p.pfs, key)
		p.order = slices.DeleteFunc(p.order, func(k string) bool { return k == key })
	case e.Part && of != nil && e.Subject == bind.Settings:
		// Of VFs that are there, whatever else is still to be done.
		of.made = of.want
		of.set++
	case e.Part && of != nil:
		of.took++
	case e.Err == nil:
		p.other++
	}
	p.line.Set(p.text())
}

func (p *progress) text() string {
	var parts []string
	for _, key := range p.order {
		of := p.pfs[key]
		text := fmt.Sprintf("%s %d/%d VFs", of.label, of.made, of.want)
		if of.set > 0 {
			text += fmt.Sprintf(", %d/%d set", of.set, of.want)
		}
		if of.took > 0 {
			text += fmt.Sprintf(", %d/%d taken", of.took, of.want)
		}
		parts = append(parts, text)
	}
	if p.other > 0 {
		parts = append(parts, count(p.other, "device")+" done")
	}
	return strings.Join(parts, "; ")
}
