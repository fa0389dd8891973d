package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/vfio/holder"
)

// A refusal is data: each command says with --json who has what, what would override it and what to do, on a dry run
// too, with exit status 3, and prints no write that the refusal forbids.
func TestRefusals(t *testing.T) {
	const (
		pf  = "0000:01:00.0"
		vf  = "0000:01:10.0"
		usb = "0000:00:1d.0"
	)
	type refusal struct {
		Kind, Device string
		Who, Force   *string
		Hint         *string `json:"cure"`
		PID          *int
		Reason       string
	}
	k := hosttest.NewLab(t, nil)
	k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{"ens1"}}}
	mustOnKernel(t, k, "vf", "create", pf, "3")
	mustOnKernel(t, k, "assign", "web", "--from", pf+"/vf0")
	k.Process(4711, "qemu-system-x86_64", "/dev/vfio/devices/vfio0")

	for _, c := range []struct {
		line  string
		kind  string
		who   string
		force bool
		hint  bool
	}{
		{"bind ens1", "route", "(ens1) carries the default route", true, false},
		{"bind ens1 --dry-run", "route", "(ens1) carries the default route", true, false},
		{"bind " + pf, "vfs", "", false, true},
		{"unbind " + vf, "lease", "web", true, true},
		{"vf destroy " + pf, "lease", "web", true, true},
		{"vf destroy " + pf + " --dry-run", "lease", "web", true, true},
		{"vf create " + pf + " 0 --dry-run", "lease", "web", true, true},
		{"assign db --from ens1", "route", "(ens1) carries the default route", true, false},
		{"assign db --from ens1 --dry-run", "route", "(ens1) carries the default route", true, false},
		{"assign web --from " + pf + "/vf1", "guest", "", false, true},
	} {
		a := onKernel(k, append(strings.Fields(c.line), "--json")...)
		var got struct {
			Error    string
			Refusals []refusal
		}
		if err := json.Unmarshal([]byte(a.stdout), &got); err != nil || a.status != exitRefused || got.Error == "" {
			t.Errorf("%s: exit status %d, %v: %s%s", c.line, a.status, err, a.stdout, a.stderr)
			continue
		}
		found := false
		for _, r := range got.Refusals {
			who := ""
			if r.Who != nil {
				who = *r.Who
			}
			found = found || r.Kind == c.kind && who == c.who && (r.Force != nil) == c.force &&
				(r.Hint != nil) == c.hint &&
				r.Reason != ""
		}
		if !found {
			t.Errorf("%s: %s", c.line, a.stdout)
		}
		if plain := onKernel(k, strings.Fields(c.line)...); plain.stdout != "" || plain.status != exitRefused {
			t.Errorf("%s: exit status %d, on standard output %q", c.line, plain.status, plain.stdout)
		}
	}

	a := onKernel(k, "bind", "ens1", pf+"/vf2", "--keep-going", "--dry-run", "--json")
	var views []changeView
	if err := json.Unmarshal([]byte(a.stdout), &views); err != nil || len(views) < 2 {
		t.Fatalf("%v: %s%s", err, a.stdout, a.stderr)
	}
	for _, v := range views {
		if refused := strings.HasPrefix(v.Address, "0000:07"); refused != (len(v.Refusals) > 0) ||
			refused != (len(v.Writes) == 0) {
			t.Errorf("with --keep-going: %+v", v)
		}
	}
}

// Each reason of a refusal has a line, and none is told twice.
func TestLinesOf(t *testing.T) {
	refused := &holder.RefusedError{What: "take it", Hint: "do else", Reasons: []holder.Reason{
		{Text: "one"}, {Text: "two", Hint: "mend"}, {Text: "one"},
	}}
	single := holder.Because("take it", holder.Reason{Text: "one"}, "do else")
	for _, c := range []struct {
		err  error
		want string
	}{
		{refused, "refused to take it:|  one|  two (mend)|  do else"},
		{single, "refused to take it: one (do else)"},
		{errors.Join(single, errors.New("x"), single), "refused to take it: one (do else)|x"},
		{fmt.Errorf("a: %w and %w", single, refused), fmt.Sprintf("a: %v and %v", single, refused)},
		{fmt.Errorf("a: %w", refused), "a: " + refused.Error()},
	} {
		if got := strings.Join(linesOf(c.err), "|"); got != c.want {
			t.Errorf("%q\nwant %q", got, c.want)
		}
	}
}
