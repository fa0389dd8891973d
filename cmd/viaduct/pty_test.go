package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/terminal"
	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// asProgram makes this test be the program, for those that need it as a process of its own.
const asProgram = "VIADUCT_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Args[0] == "viaduct" && len(os.Args) > 2 && os.Args[2] == "--unless-confirmed" {
		// It was started to guard a host of a test's, which it cannot know: TestGuard has the guard itself.
		fmt.Println(guardReady)
		os.Exit(exitDone)
	}
	if os.Getenv(asProgram) != "" || len(os.Args) > 1 && os.Args[1] == heldCommandName {
		os.Exit(run(append([]string{"viaduct"}, os.Args[1:]...), os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// pty is a terminal that somebody sits at: pty(7).
type pty struct {
	t     *testing.T
	ours  *os.File
	mu    sync.Mutex
	said  bytes.Buffer
	grown chan struct{} // closed and made anew with each piece of text
	over  chan struct{} // closed when nothing more comes
	ended chan error
}

// onTerminal starts a program on a terminal of so many columns.
func onTerminal(t *testing.T, columns int, cmd *exec.Cmd) *pty {
	t.Helper()
	ours, theirs := terminalOf(t, columns)
	defer theirs.Close()

	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &pty{t: t, ours: ours, grown: make(chan struct{}), over: make(chan struct{}), ended: make(chan error, 1)}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	go p.read(cmd)
	return p
}

// terminalOf are both ends of a terminal of so many columns: who is at it, and what runs there.
func terminalOf(t *testing.T, columns int) (ours, theirs *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no pseudo terminal can be had here: %v", err)
	}
	t.Cleanup(func() { ours.Close() })
	fd := int(ours.Fd())
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: uint16(columns)})
	}
	if err != nil {
		t.Fatal(err)
	}
	theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo terminal can be had here: %v", err)
	}
	return ours, theirs
}

// What another program writes is not waited for at a terminal.
func TestNotTyped(t *testing.T) {
	_, theirs := terminalOf(t, 80)
	defer theirs.Close()
	defer func(was *os.File) { os.Stdin = was }(os.Stdin)
	os.Stdin = theirs
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	for _, line := range []string{"libvirt-hook -- web prepare begin -",
		"libvirt-hook --network -- net port-created begin -", "migrate --peer"} {
		if a := onKernel(k, strings.Fields(line)...); a.status != exitUsage ||
			!strings.Contains(a.text(), "its standard input is a terminal") {
			t.Errorf("%s: %+v", line, a)
		}
	}
}

func (p *pty) read(cmd *exec.Cmd) {
	b := make([]byte, 4096)
	for {
		n, err := p.ours.Read(b)
		p.mu.Lock()
		p.said.Write(b[:n])
		close(p.grown)
		p.grown = make(chan struct{})
		p.mu.Unlock()
		if err != nil {
			// EIO: nobody has the other end any more.
			close(p.over)
			p.ended <- cmd.Wait()
			return
		}
	}
}

// await waits until the terminal shows a text, and returns all that it showed.
func (p *pty) await(text string) string {
	p.t.Helper()
	end := time.After(60 * time.Second)
	for {
		p.mu.Lock()
		said, grown := p.said.String(), p.grown
		p.mu.Unlock()
		if strings.Contains(said, text) {
			return said
		}
		select {
		case <-grown:
		case <-end:
			p.t.Fatalf("%q was never shown:\n%q", text, said)
		}
	}
}

// begun waits until the program shows anything, or ends.
func (p *pty) begun() {
	p.mu.Lock()
	said, grown := p.said.Len(), p.grown
	p.mu.Unlock()
	if said > 0 {
		return
	}
	select {
	case <-grown:
	case <-p.over:
	}
}

func (p *pty) typing(keys string) {
	p.t.Helper()
	if _, err := io.WriteString(p.ours, keys); err != nil {
		p.t.Fatal(err)
	}
}

// end waits for the program to end, and returns what was shown and its status.
func (p *pty) end() (string, int) {
	p.t.Helper()
	select {
	case err := <-p.ended:
		status := 0
		if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // it is Wait's own
			status = exit.ExitCode()
		}
		return p.said.String(), status
	case <-time.After(60 * time.Second):
		p.t.Fatalf("it does not end:\n%q", p.said.String())
	}
	return "", 0
}

// program is this test as the program.
func program(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), asProgram+"=1", "TERM=xterm", "NO_COLOR=", "COLUMNS=")
	return cmd
}

// At a terminal list and plan are in colour, and no line is wider than that; nobody is asked anything.
func TestTerminal(t *testing.T) {
	dir := hosttest.Load(t, filepath.Join(machines, "amd-vi.txt")).Dir(t)
	for line, want := range map[string]string{
		"list": "GROUP 12: takes 1 device off the host", "list --tree": "└─01─ 0000:01:00.0", "show 02:00.0": "82576",
		"plan -f testdata/host.yaml": "vf0-3: mac stable, vlan 100-103", "vf list": "enp2s0",
	} {
		for _, columns := range []int{80, 50} {
			p := onTerminal(t, columns, program(append([]string{"--host", dir}, strings.Fields(line)...)...))
			said, status := p.end()
			if !strings.Contains(said, want) && columns == 80 || !strings.Contains(said, "\x1b[1m") || status != 0 &&
				status != 4 {
				t.Errorf("%s: %d, %q", line, status, said)
			}
			for text := range strings.SplitSeq(plain(said), "\r\n") {
				if terminal.Width(text) > columns && !oneWord(text, columns) {
					t.Errorf("%s: %d columns of %d: %s", line, terminal.Width(text), columns, text)
				}
			}
		}
	}
}

// slowly makes this test a program that applies a file on a host whose kernel takes its time, until somebody opens the
// other end of a pipe.
const slowly = "VIADUCT_TEST_SLOWLY"

func TestSlowly(t *testing.T) {
	pipe := os.Getenv(slowly)
	if pipe == "" {
		t.Skip("TestProgressAtTerminal runs it, as a process of its own")
	}
	k := hosttest.NewLab(t, nil)
	var once sync.Once
	wait := func() {
		if f, err := os.Open(pipe); err == nil {
			_, _ = io.Copy(io.Discard, f)
			f.Close()
		}
	}
	k.SetFault(func(op, name string) error {
		if op == "write" && strings.HasSuffix(name, "0000:01:00.0/sriov_numvfs") {
			once.Do(wait)
		}
		return nil
	})
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	status := runOn(open, []string{"viaduct", "apply", "-f", os.Getenv("VIADUCT_TEST_FILE")}, os.Stdout, os.Stderr)
	os.Exit(status)
}

// What takes long shows how far it is in one line, which is gone in the end; ^C ends it where nothing is lost.
func TestProgressAtTerminal(t *testing.T) {
	file := filepath.Join(t.TempDir(), "host.yaml")
	text := "pfs:\n  - {select: \"0000:01:00.0\", count: 4, vfs: [{driver: vfio, vlan: 100+index}]}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}

	for name, c := range map[string]struct {
		keys, says string
		status     int
	}{
		"to the end": {"", "as declared", 0}, "^C": {"\x03", "interrupted after its VFs were made", 1},
	} {
		pipe := filepath.Join(t.TempDir(), "pipe")
		if err := unix.Mkfifo(pipe, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestSlowly$")
		cmd.Env = append(os.Environ(), slowly+"="+pipe, "VIADUCT_TEST_FILE="+file, "TERM=xterm", "NO_COLOR=1",
			"COLUMNS=")
		p := onTerminal(t, 80, cmd)
		p.await("enp1s0 0/4 VFs")
		if c.keys != "" {
			p.typing(c.keys)
			p.await("interrupted: ")
		}
		go func() {
			if f, err := os.OpenFile(pipe, os.O_WRONLY, 0); err == nil {
				f.Close()
			}
		}()
		said, status := p.end()
		if status != c.status || !strings.Contains(said, c.says) {
			t.Errorf("%s: status %d: %q", name, status, said)
		}
		if last := said[strings.LastIndex(said, "/4 VFs")+6:]; !strings.Contains(last, "\r\x1b[K") {
			t.Errorf("%s: the line of progress is left: %q", name, said)
		}
	}
}
