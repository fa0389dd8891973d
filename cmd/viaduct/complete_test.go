package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// completed is what a shell is offered for a line whose last word is being typed.
func completed(t *testing.T, k *hosttest.Kernel, line string) []string {
	t.Helper()
	a := mustOnKernel(t, k, append(strings.Split(line, " "), generate)...)
	return strings.Fields(a.stdout)
}

// What may stand next is suggested: commands, options, the values of each, and of selectors and settings both sides.
func TestComplete(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	mustOnKernel(t, k, "vf", "create", "0000:01:00.0", "2")
	mustOnKernel(t, k, "assign", "web", "--from", "0000:01:00.0", "--format", "json")
	in(t, k, "etc/viaduct/host.yaml", "pfs: [{select: \"0000:02:00.0\", count: 1, vfs: [{pool: net, driver: vfio}]}]\n")
	for line, want := range map[string]string{
		"stat":                                "status",
		"vf ":                                 "list ls create destroy set get sync",
		"list --tr":                           "--tree",
		"--col":                               "--color",
		"bind --driver ":                      "vfio none vfio-pci pci-stub",
		"vf create 0000:01:00.0 1 --driver h": "home",
		"bind --driver=vfio-":                 "--driver=vfio-pci",
		"bind --force mou":                    "mount",
		"release --force ":                    "quarantine",
		"assign web --format prox":            "proxmox",
		"pool --format ":                      "libvirt-network",
		"assign web --from n":                 "net",
		"pool ":                               "net",
		"release ":                            "web",
		"why guest=":                          "guest=web",
		"list -o ":                            "wide json",
		"adopt -o ":                           "", // a file
		"migrate web --by ":                   "failover vfio replug",
		"vf create 0000:01:00.0 --eswitch s":  "switchdev",
		"vf create 0000:01:00.0 4 sp":         "spoofchk=",
		"vf set 0000:01:00.0/vf":              "0000:01:00.0/vf0 0000:01:00.0/vf1",
		"vf set 0000:01:00.0/vf0 trust=":      "trust=on trust=off",
		"vf set 0000:01:00.0/vf0 mac=":        "mac=stable",
		"assign web --set link=":              "link=auto link=enable link=disable",
		"show group=10":                       "group=10",
		"show mac":                            "mac=",
		"show mac=":                           "mac=52:54:00:00:00:01 mac=52:54:00:00:00:02 mac=52:54:00:00:00:03",
		"show 0000:01:10.":                    "0000:01:10.0 0000:01:10.2",
		"help gp":                             "gpu",
		"man ":                                "viaduct host.yaml viaduct-json",
		"completion ":                         "bash zsh fish",
		"plan -f ":                            "", // files
		"snapshot ":                           "",
		"run web --from net -- qemu ":         "",
	} {
		got := completed(t, k, line)
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}

// In each shell what is begun is completed, and nothing is run.
func TestShellCompletion(t *testing.T) {
	begin := map[string]struct {
		words []string
		first string
	}{
		"bash": {
			[]string{"--norc", "--noprofile", "-i"},
			"bind 'set enable-bracketed-paste off'; source <(viaduct completion bash)",
		},
		"zsh": {
			[]string{"-f", "-i"},
			"setopt no_beep; unset zle_bracketed_paste; autoload -U compinit; compinit -D -u; " +
				"source <(viaduct completion zsh)",
		},
		"fish": {[]string{"--no-config", "-i"}, "viaduct completion fish | source"},
	}
	for shell, c := range begin {
		t.Run(shell, func(t *testing.T) {
			program, err := exec.LookPath(shell)
			if err != nil {
				t.Skipf("there is no %s here; hack/test --long fetches it", shell)
			}
			completesIn(t, exec.Command(program, c.words...), c.first)
		})
	}
}

func completesIn(t *testing.T, cmd *exec.Cmd, first string) {
	dir := hosttest.Load(t, filepath.Join(machines, "amd-vi.txt")).Dir(t)
	bin := t.TempDir()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\n" + asProgram + "=1 exec " + self + " \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "viaduct"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "mine.yaml"), nil, 0o600); err != nil {
		t.Fatal(err)
	}

	cmd.Dir = bin
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "PS1=@ ", "TERM=dumb", "HISTFILE=", "HOME="+bin,
		"INPUTRC=/dev/null")
	p := onTerminal(t, 200, cmd)
	p.typing(first + "; echo rea''dy\n")
	p.await("ready")
	for i, c := range []struct{ typed, want string }{
		{"stat", "status"},
		{"--host H show ens", "ens1"},
		{"--host H bind --driver vfio-", "vfio-pci"},
		{"--host H show 0000:07:01", "0000:07:01.0"},
		{"--host H show group=1", "group=1"},
		{"bind --force swa", "swap"},
		{"assign web --format prox", "proxmox"},
		{"--host H vf set 02:00.0/vf0 spo", "spoofchk="},
		{"list --tr", "--tree"},
		{"plan -f min", "mine.yaml"},
	} {
		mark := fmt.Sprintf("done%d", i)
		// What was completed is printed, and not run.
		c.typed = strings.ReplaceAll(c.typed, "--host H", "--host "+dir)
		p.typing("viaduct " + c.typed + "\t")
		p.await("viaduct " + strings.ReplaceAll(c.typed, c.typed[strings.LastIndexAny(c.typed, " ")+1:], c.want))
		p.typing("\x15echo " + mark[:4] + "''" + mark[4:] + "\n")
		p.await(mark)
	}
	p.typing("exit\n")
	p.end()
}
