//go:build lab

package labtest

import (
	"bufio"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// everyWrite reports whether the long run was asked for, which kills at every write.
func everyWrite() bool { return os.Getenv("LAB_ROUNDS") == "200" }

// killAt runs viaduct and kills it at its nth write: the command (parent), the child that writes, or both. It reports
// whether it came to that write. A child that outlives its command may still write what it was at when killAt returns;
// rest waits for its end, and returns what all of them said.
func killAt(t *testing.T, n int, whom string, args ...string) (killed bool, rest func() string) {
	t.Helper()
	return killProgram(t, n, whom, viaduct, args...)
}

// killProgram is killAt for another program that uses viaduct's packages.
func killProgram(t *testing.T, n int, whom, program string, args ...string) (killed bool, rest func() string) {
	t.Helper()
	cmd := exec.Command("./killat", append([]string{strconv.Itoa(n), whom, program}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	if killed = line == "killed\n"; !killed || whom == "child" { // the command lives, and tells
		_ = cmd.Wait()
		return killed, func() string { return line + stderr.String() }
	}
	return true, func() string {
		_ = cmd.Wait()
		return line + stderr.String()
	}
}
