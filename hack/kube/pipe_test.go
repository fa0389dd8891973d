//go:build lab

package kube

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"
)

// relay has the API server answer at a socket in the shared folder, until this process is ended: what QEMU starts for a
// connection of the node's is in another network.
func relay() int {
	certificate, err := os.ReadFile(certificate)
	if err == nil {
		err = os.WriteFile(shared+"/ca.crt", certificate, 0o644)
	}

	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}

	listener, err := net.Listen("unix", shared+"/api")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}

	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	go func() {
		for {
			from, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				to, err := net.Dial("tcp", service+":443")
				if err != nil {
					_ = from.Close()
					return
				}
				join(from, from, to)
			}()
		}
	}()

	<-end
	return 0
}

// dial is one connection to that socket: what QEMU gives it as standard input and output.
func dial() int {
	to, err := net.Dial("unix", shared+"/api")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	join(os.Stdin, os.Stdout, to)
	return 0
}

// join passes on what either side sends, until one of them ends.
func join(in io.Reader, out io.Writer, to net.Conn) {
	ended := make(chan struct{}, 2)
	pass := func(w io.Writer, r io.Reader) {
		_, _ = io.Copy(w, r)
		ended <- struct{}{}
	}
	go pass(to, in)
	go pass(out, to)
	<-ended
	_ = to.Close()
	if c, ok := in.(io.Closer); ok {
		_ = c.Close()
	}
}
