// Command viaduct-kube gives a node's passthrough devices and VFs to the pods of a Kubernetes cluster. It stands on
// viaduct's packages and on the node's books, so that a guest that was started by hand and a pod never get the same
// function.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/vfio/bind"
)

// Exit statuses, as those of viaduct.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

const usage = `usage: viaduct-kube COMMAND [OPTION...]

  serve --node NAME       give the declared functions to the cluster's pods
  cdi                     write the CDI specifications, at boot before the kubelet
  manifests               print device classes, access rights and the daemon set
  drain NODE [SELECTOR]   evict pods from functions, so that viaduct apply can go on
  version                 print the version

viaduct-kube COMMAND -h lists the options of a command.
`

// usageError is wrong usage.
type usageError struct{ error }

func main() {
	if bind.ServeWrites() {
		return
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is the whole program; it returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	err := command(ctx, args, stdout, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return exitDone
	}
	if err == nil {
		return exitDone
	}
	fmt.Fprintln(stderr, "viaduct-kube:", err)
	if _, wrong := errors.AsType[usageError](err); wrong {
		return exitUsage
	}
	return exitFailed
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return usageError{fmt.Errorf("no command given\n%s", strings.TrimSpace(usage))}
	}
	name, args := args[0], args[1:]
	switch name {
	case "serve":
		return serveCommand(ctx, args, stderr)
	case "cdi":
		return cdiCommand(args, stderr)
	case "manifests":
		return manifestsCommand(args, stdout, stderr)
	case "drain":
		return drainCommand(ctx, args, stdout, stderr)
	case "version":
		fmt.Fprintln(stdout, "viaduct-kube", version())
		return nil
	case "help", "-h", "--help":
		fmt.Fprint(stdout, usage)
		return nil
	}
	return usageError{fmt.Errorf("unknown command %q\n%s", name, strings.TrimSpace(usage))}
}

// version is the commit that the program was built from, as Go notes it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return info.Main.Version
}

// common are the options that several commands have.
type common struct {
	driver, kubeletDir, cdiDir, config string
}

func (c *common) flags(f *flag.FlagSet) {
	f.StringVar(&c.driver, "driver", "viaduct.dev", "`name` of the driver, and domain of its resources")
	f.StringVar(&c.kubeletDir, "kubelet-dir", "/var/lib/kubelet", "the kubelet's `folder`")
	f.StringVar(&c.cdiDir, "cdi-dir", "/var/run/cdi", "`folder` of the CDI specifications that change")
	f.StringVar(&c.config, "config", node.SettingsFile, "`file` that says which provider serves each pool")
}

// parse parses a command's options, which may stand among its other words, and returns those.
func parse(f *flag.FlagSet, args []string, stderr io.Writer) (words []string, err error) {
	f.SetOutput(stderr)
	for {
		if err := f.Parse(args); err != nil {
			if !errors.Is(err, flag.ErrHelp) {
				err = usageError{err}
			}
			return nil, err
		}
		if f.NArg() == 0 {
			return words, nil
		}
		words, args = append(words, f.Arg(0)), f.Args()[1:]
	}
}

// parseOnly is parse for a command that has no other words.
func parseOnly(f *flag.FlagSet, args []string, stderr io.Writer) error {
	words, err := parse(f, args, stderr)
	if len(words) > 0 {
		err = usageError{fmt.Errorf("%s: unexpected argument %q", f.Name(), words[0])}
	}
	return err
}
