package main

import (
	"os/exec"
	"os/user"
	"slices"
	"strings"
	"testing"
)

// Whom a VMM is started as is said by names or numbers, and its environment is that user's.
func TestParseRunAs(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		me.Username: me.Uid + ":" + me.Gid, me.Uid: me.Uid + ":" + me.Gid, me.Username + ":0": me.Uid + ":0",
	} {
		if r, err := parseRunAs(text); err != nil || r.name != want {
			t.Errorf("%s: %+v, %v", text, r, err)
		}
	}
	for _, bad := range []string{"", "no-such-user", "root:no-such-group", ":0"} {
		if r, err := parseRunAs(bad); err == nil {
			t.Errorf("%q: %+v", bad, r)
		}
	}

	r, err := parseRunAs(me.Username)
	if err != nil {
		t.Fatal(err)
	}
	env := r.environment([]string{"HOME=/elsewhere", "PATH=/bin", "USER=somebody"})
	homes := slices.DeleteFunc(slices.Clone(env), func(kv string) bool { return !strings.HasPrefix(kv, "HOME=") })
	if len(homes) != 1 || homes[0] != "HOME="+me.HomeDir || !slices.Contains(env, "PATH=/bin") {
		t.Errorf("%q", env)
	}
	if c := r.credential(); int(c.Uid) != r.uid || slices.Contains(c.Groups, uint32(r.gid)) {
		t.Errorf("%+v", c)
	}
}

// A VMM whose memory cannot be let it lock is not left to run: that is an error.
func TestLetLockFails(t *testing.T) {
	cmd := exec.Command("/bin/true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if err := letLock(cmd.Process.Pid); err == nil || !strings.Contains(err.Error(), "raise the limit of memory") {
		t.Errorf("of a process that has ended: %v", err)
	}
}
