package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Transport reaches another host by a command: ssh, or any other whose standard input and output lead to the viaduct
// there.
type Transport struct {
	words   []string
	version string
	stderr  io.Writer
}

// ParseTransport reads what --to says: HOST for ssh, or exec:COMMAND for a command that a shell reads, after whose
// words those that are to be run on the other host are put.
func ParseTransport(to, version string, stderr io.Writer) (*Transport, error) {
	t := &Transport{version: version, stderr: stderr}
	command, isCommand := strings.CutPrefix(to, "exec:")
	switch {
	case isCommand && strings.TrimSpace(command) == "":
		return nil, errors.New("exec: of which command?")
	case isCommand:
		t.words = []string{"/bin/sh", "-c", command + ` "$@"`, "sh", "viaduct", "migrate", "--peer"}
	case to == "" || strings.HasPrefix(to, "-") || strings.ContainsAny(to, " \t\n/"):
		return nil, fmt.Errorf("invalid host name %q for ssh", to)
	default:
		t.words = []string{"ssh", "-T", "--", to, "viaduct", "migrate", "--peer"}
	}
	return t, nil
}

// Connect begins a conversation.
func (t *Transport) Connect(ctx context.Context) (*Pipe, error) {
	s, err := t.open()
	if err != nil {
		return nil, err
	}
	return Converse(ctx, s, t.version)
}

// Data opens a stream to the QEMU there that waits for the memory of a move.
func (t *Transport) Data(_ context.Context, id string) (Stream, error) { return t.open("--data", id) }

func (t *Transport) open(more ...string) (Stream, error) {
	words := append(append([]string(nil), t.words...), more...)
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stderr = t.stderr
	// In a group of its own: a signal of the terminal is for viaduct, which then ends the conversation itself.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("the way to the other host: %w", err)
	}
	return &process{cmd: cmd, Reader: out, WriteCloser: in}, nil
}

// process is the standard input and output of a command.
type process struct {
	io.Reader
	io.WriteCloser

	cmd  *exec.Cmd
	once sync.Once
}

// Close ends the command's input, upon which it ends; one that does not is ended.
func (p *process) Close() error {
	p.once.Do(func() {
		_ = p.WriteCloser.Close()
		ended := make(chan struct{})
		go func() {
			_ = p.cmd.Wait()
			close(ended)
		}()
		const grace = 5 * time.Second
		select {
		case <-ended:
		case <-time.After(grace):
			_ = p.cmd.Process.Kill()
			<-ended
		}
	})
	return nil
}
