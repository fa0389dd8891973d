// Command viaduct shows a host's IOMMU groups, takes devices from the host's drivers and gives them back, and makes
// SR-IOV virtual functions. The commands are thin: flags become an options struct, and one call into the packages does
// the work.
package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/changelog"
	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/terminal"
	"viaduct/internal/nearest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Exit statuses; they are documented in the README.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 3
	exitDiffers = 4 // of plan, apply --dry-run and status
)

func main() {
	if bind.ServeWrites() {
		return
	}
	// One more than there are CPUs: as long as one is idle, Go's monitor thread lets system calls be. On a slow machine
	// it would take each one that reads an attribute for stuck.
	runtime.GOMAXPROCS(runtime.NumCPU() + 1)
	os.Exit(run(os.Args, os.Stdout, os.Stderr))
}

// untilSignal is for commands that must not end in the middle: the first signal ends the context, a second one the
// process. The others end at once, as processes do.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	// What is begun is ended although nobody reads on.
	signal.Ignore(unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	told := context.AfterFunc(ctx, func() {
		stop()
		// The terminal is gone, and that may be told twice.
		signal.Ignore(unix.SIGHUP)
	})
	return ctx, func() {
		// What is started afterwards would inherit that.
		told()
		stop()
	}
}

// env is what every command works with.
type env struct {
	stdout, stderr io.Writer
	screen         terminal.Screen // stdout, for text that is laid out
	noteWidth      int             // of the terminal that notes go to, 0 if that is none
	hostName       string          // --host
	colour         string          // --color
	begun          string          // the word that is being typed, where a shell asks to complete it
	typed          *typing         // and the words before it
	json, dryRun   bool
	commandLine    string
	changes        bool // the command changes a host that runs
	progress       *progress
	steps, verbose bool
	openHost       func(name string) (*iommu.Host, error) // iommu.Open, but in tests
	unprinted      error                                  // why something could not be printed
}

// open opens the host that --host names; the caller closes it.
func (e *env) open() (*iommu.Host, error) { return e.openHost(e.hostName) }

// look opens the host and scans it; the caller closes it.
func (e *env) look() (*iommu.Host, *iommu.Topology, error) {
	h, err := e.open()
	if err != nil {
		return nil, nil, err
	}
	t, err := look(h)
	if err != nil {
		return nil, nil, errors.Join(err, h.Close())
	}
	return h, t, nil
}

// look scans a host, and gives its devices the roles that are declared.
func look(h *iommu.Host) (*iommu.Topology, error) {
	t, err := iommu.Scan(h)
	if err == nil {
		err = declared.Roles(h, t)
	}
	return t, err
}

// mayChange is asked first by every command that changes the host, or, with --dry-run, would; more are the folders that
// it writes to beside /sys and /run.
func (e *env) mayChange(more ...string) error {
	switch live := e.hostName == "" || e.hostName == "/"; {
	case !live && e.dryRun:
		return nil
	case !live:
		return usagef("%s is a captured host: viaduct can read it, not change it", e.hostName)
	}
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	if h.Real() && os.Geteuid() != 0 && !e.dryRun {
		return fmt.Errorf("changing drivers and VFs needs root: %w", fs.ErrPermission)
	}
	for _, dir := range append([]string{"sys", "run"}, more...) {
		if err := h.Writable(dir); errors.Is(err, unix.EROFS) && e.dryRun {
			e.note("without --dry-run nothing would be changed: /%s is mounted read-only here", dir)
		} else if errors.Is(err, unix.EROFS) {
			return fmt.Errorf("/%s is mounted read-only here, and nothing was changed (mount -o remount,rw /%s; of a "+
				"container, run viaduct on the host itself)", dir, dir)
		}
	}
	return nil
}

// note tells people something that is no part of the data.
func (e *env) note(format string, a ...any) {
	text := "viaduct: " + fmt.Sprintf(format, a...)
	if e.noteWidth > 0 {
		// A terminal itself would break words.
		text = strings.Join(terminal.Wrap(text, e.noteWidth), "\n  ")
	}
	fmt.Fprintln(e.stderr, text)
}

// usageError is an error in the command line.
type usageError struct{ error }

func usagef(format string, a ...any) error { return usageError{fmt.Errorf(format, a...)} }

// run is the whole program; it returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	return runOn(iommu.Open, args, stdout, stderr)
}

// runOn is run with hosts of another kind.
func runOn(open func(string) (*iommu.Host, error), args []string, stdout, stderr io.Writer) int {
	notes := terminal.Of(stderr, "", os.Getenv)
	line := terminal.NewProgress(notes)
	defer line.Done()
	out := &checkedWriter{w: line.Over(stdout)}
	text, said := terminal.NewPrintable(out), terminal.NewPrintable(line.Over(stderr))
	e := &env{
		stdout: text, stderr: said, noteWidth: max(notes.Width-2, 0), openHost: open,
		commandLine: changelog.Command(args), progress: &progress{line: line, pfs: map[string]*pfProgress{}},
	}
	app := newApp(e)
	before := app.Before
	app.Before = func(c *cli.Context) error {
		e.screen = terminal.Of(stdout, e.colour, os.Getenv)
		e.screen.Writer = out
		return before(c)
	}
	if e.complete(app, args) {
		_ = text.Flush()
		return exitDone
	}
	err := app.Run(flagsFirst(app, args))
	defer func() { _ = said.Flush() }()
	if e.json && err != nil && !out.wrote && exitStatus(err) != exitUsage {
		e.tellFailed(err)
	}
	flushed := text.Flush()
	switch lost := cmp.Or(e.unprinted, flushed, out.err); {
	case lost == nil:
	case err == nil, errors.Is(err, errDiffers), errors.Is(err, errUnusable):
		// Nobody has read what the exit status would stand for.
		err = lost
	default:
		err = errors.Join(err, lost)
	}
	line.Done()
	if err == nil {
		return exitDone
	}

	switch {
	case errors.Is(err, errDiffers):
		return exitDiffers
	case errors.Is(err, errUnusable):
		return exitFailed
	}
	ended, ran := errors.AsType[*vmmEnded](err)
	if ran && ended.error == nil {
		return ended.status
	}
	e.logFailure(err)
	for _, line := range linesOf(err) {
		e.note("%s", line)
	}
	if ran {
		return ended.status
	}
	return exitStatus(err)
}

// linesOf is an error as it is printed: each of several by itself, each reason of a refusal in a line where there are
// several, and none twice.
func linesOf(err error) []string {
	var out []string
	add := func(lines ...string) {
		for _, line := range lines {
			if !slices.Contains(out, line) {
				out = append(out, line)
			}
		}
	}
	text := err.Error()
	if all, several := err.(interface{ Unwrap() []error }); several { //nolint:errorlint // it walks the tree itself
		var parts []string
		for _, one := range all.Unwrap() {
			parts = append(parts, one.Error())
		}
		if strings.Join(parts, "\n") == text && len(parts) > 0 {
			for _, one := range all.Unwrap() {
				add(linesOf(one)...)
			}
			return out
		}
	}

	refused, is := errors.AsType[*holder.RefusedError](err)
	if !is || refused.Error() != text || len(refused.Reasons) < 2 {
		add(strings.Split(text, "\n")...)
		return out
	}
	add("refused to " + refused.What + ":")
	for _, r := range refused.Reasons {
		line := "  " + r.Text
		if r.Hint != "" {
			line += " (" + r.Hint + ")"
		}
		add(line)
	}
	if refused.Hint != "" {
		add("  " + refused.Hint)
	}
	return out
}

// print prints a table. It cannot fail: what could not be printed ends the command with an error, as it does with all
// else that goes to standard output.
func (e *env) print(t *terminal.Table) { e.unprinted = cmp.Or(e.unprinted, e.screen.Print(t)) }

// printRows is print for rows of cells, of which the first is the heading.
func (e *env) printRows(rows [][]string) { e.unprinted = cmp.Or(e.unprinted, e.screen.PrintRows(rows)) }

// printJSON is print for a value; one that has no JSON is such an error, too.
func (e *env) printJSON(v any) { e.unprinted = cmp.Or(e.unprinted, writeJSON(e.stdout, v)) }

// printText is print for what a function writes.
func (e *env) printText(write func(w *bufio.Writer)) {
	w := bufio.NewWriterSize(e.stdout, 64<<10)
	write(w)
	e.unprinted = cmp.Or(e.unprinted, w.Flush())
}

// checkedWriter remembers that writing failed, so that output lost to a full disk is not taken for success and each
// print need not be checked.
type checkedWriter struct {
	w     io.Writer
	wrote bool
	err   error
}

func (c *checkedWriter) Write(b []byte) (int, error) {
	c.wrote = c.wrote || len(b) > 0
	n, err := c.w.Write(b)
	if c.err == nil {
		c.err = err
	}
	return n, err
}

func exitStatus(err error) int {
	var usage usageError
	var ambiguous *iommu.AmbiguousError
	var otherPort *iommu.OtherPortError
	switch {
	case errors.As(err, &usage), errors.Is(err, iommu.ErrSyntax), errors.As(err, &ambiguous),
		errors.As(err, &otherPort):
		return exitUsage
	case isRefused(err):
		return exitRefused
	}
	return exitFailed
}

func newApp(e *env) *cli.App {
	return &cli.App{
		Name:      "viaduct",
		Usage:     "device passthrough and SR-IOV on Linux",
		UsageText: "viaduct [--host DIR|FILE] COMMAND [OPTION...] [ARGUMENT...]",
		Description: "`viaduct help COMMAND` explains a command, `viaduct help topics` lists the topics of the " +
			"manual, e.g. `viaduct help selectors`: how to name a device.\n\n" +
			"Exit status: 0 done; 1 failed; 2 wrong usage; 3 refused by a safety check, nothing was changed; 4 the " +
			"host differs from what is declared (`plan`, `apply --dry-run` and `status` only).",
		Writer:                    e.stdout,
		ErrWriter:                 e.stderr,
		HideHelpCommand:           true,
		HideVersion:               true,
		DisableSliceFlagSeparator: true,
		ExitErrHandler:            func(*cli.Context, error) {}, // or cli ends the process itself
		OnUsageError:              onUsageError,
		Flags: []cli.Flag{
			&cli.StringFlag{
				Name:        "host",
				Usage:       "look at the captured host in `DIR|FILE` (a tree or a snapshot); it is only read",
				Destination: &e.hostName,
				TakesFile:   true,
			},
			&cli.BoolFlag{Name: "version", Usage: "print the version"},
			// cli leaves it out where there is a command of that name.
			cli.HelpFlag,
			&cli.StringFlag{
				Name:        "color",
				Usage:       "`WHEN` text is in colour: " + nearest.Or(terminal.Colours),
				Value:       terminal.Colours[0],
				Destination: &e.colour,
			},
		},
		Before: func(c *cli.Context) error {
			if c.IsSet("host") && e.hostName == "" {
				return usagef("--host: name a folder or a snapshot")
			}
			if !slices.Contains(terminal.Colours, e.colour) {
				return usagef("--color: invalid value %q: want %s", e.colour, nearest.Or(terminal.Colours))
			}
			return nil
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return unknownCommand(c.App.Commands, c.Args().First(), "viaduct")
			}
			if c.Bool("version") {
				fmt.Fprintln(e.stdout, "viaduct", buildVersion())
				return nil
			}
			return cli.ShowAppHelp(c)
		},
		Commands: slices.Concat(
			group("See the host", listCommand(e), showCommand(e), logCommand(e), whyCommand(e), iommuCommand(e),
				doctorCommand(e), verifyCommand(e), snapshotCommand(e)),
			group("Take devices and give them back", bindCommand(e), unbindCommand(e), recoverCommand(e)),
			group("Virtual functions", vfCommand(e)),
			group("The declared host", planCommand(e), applyCommand(e), statusCommand(e), undoCommand(e),
				adoptCommand(e), installCommand(e), uninstallCommand(e), watchCommand(e), schemaCommand(e)),
			group("Guests", assignCommand(e), releaseCommand(e), leasesCommand(e), runCommand(e), migrateCommand(e),
				poolCommand(e)),
			group("More", helpCommand(e), manCommand(e), completionCommand(e), versionCommand(e)),
			group("", heldCommand(), libvirtHookCommand(e)),
		),
	}
}

// group puts commands under a heading of the help.
func group(heading string, commands ...*cli.Command) []*cli.Command {
	for _, c := range commands {
		c.Category = heading
	}
	return commands
}

// unknownCommand says that there is no such command, and which one may be meant.
func unknownCommand(commands []*cli.Command, name, above string) error {
	var names []string
	for _, c := range commands {
		if !c.Hidden {
			names = append(names, c.Names()...)
		}
	}
	hint := nearest.Ask(name, names)
	if hint == "" {
		hint = " (" + above + " --help lists them)"
	}
	return usagef("there is no command %q%s", name, hint)
}

// onUsageError says of a flag that there is none which one may be meant.
func onUsageError(c *cli.Context, err error, _ bool) error {
	name, unknown := strings.CutPrefix(err.Error(), "flag provided but not defined: -")
	if !unknown {
		return usageError{err}
	}
	dashes := func(name string) string { return strings.Repeat("-", min(len(name), 2)) + name }
	var names []string
	for _, f := range append(slices.Clone(c.Command.Flags), c.App.Flags...) {
		for _, n := range f.Names() {
			names = append(names, dashes(n))
		}
	}
	name = dashes(strings.TrimLeft(name, "-"))
	of := ""
	if c.Command.Name != c.App.Name && c.Command.Name != "" {
		of = c.Command.Name + ": "
	}
	return usagef("%sunknown option %s%s", of, name, nearest.Ask(name, names))
}

// command fills in what all commands have in common.
func command(c *cli.Command) *cli.Command {
	c.OnUsageError = onUsageError
	c.HideHelpCommand = true
	return c
}

func (e *env) jsonFlag() cli.Flag {
	return &cli.BoolFlag{Name: "json", Usage: "print JSON instead of text", Destination: &e.json}
}

// dryRunFlags are those of each command that can say what it would do.
func (e *env) dryRunFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{
			Name: "dry-run", Aliases: []string{"n"}, Usage: "print what would change, and change nothing",
			Destination: &e.dryRun,
		},
		e.stepsFlag("the --dry-run", func(*cli.Context, bool) error {
			// Whoever asks for the writes wants to see them, not to make them.
			e.dryRun = e.dryRun || e.steps
			return nil
		}),
	}
}

func (e *env) stepsFlag(of string, then func(*cli.Context, bool) error) cli.Flag {
	return &cli.BoolFlag{
		Name: "steps", Usage: "print the writes of " + of + " as shell commands, in their order",
		Destination: &e.steps, Action: then,
	}
}

// flagsFirst puts the flags before the arguments, within the command that they belong to: cli takes a flag after an
// argument for another argument, and `bind 01:00.0 --dry-run` would bind. The program's own flags go before the
// command, wherever they stand.
func flagsFirst(app *cli.App, args []string) []string {
	if len(args) == 0 || slices.Contains(args, generate) {
		return args
	}
	flags, commands := app.Flags, app.Commands
	var global, out, pending []string
	all := func(more ...[]string) []string {
		return slices.Concat(append([][]string{args[:1], global, out}, more...)...)
	}
	rest := args[1:]
	for len(rest) > 0 {
		arg := rest[0]
		rest = rest[1:]
		if arg == "--" {
			// What follows are arguments, whatever they look like.
			return all([]string{arg}, pending, rest)
		}
		if _, err := strconv.Atoi(arg); err == nil && arg[0] == '-' {
			// A negative number is an argument, and wrong.
			return all([]string{"--"}, pending, []string{arg}, rest)
		}
		if len(arg) > 1 && arg[0] == '-' {
			to, known := &out, flags
			if arg == "--help" || arg == "-h" {
				// Each command has one of its own, and cli takes an argument for the command that it is about.
				out = append(out, arg)
				return all()
			}
			if flagNamed(flags, arg) == nil && flagNamed(app.Flags, arg) != nil {
				to, known = &global, app.Flags
			}
			*to = append(*to, arg)
			if takesValue(known, arg) && len(rest) > 0 {
				*to, rest = append(*to, rest[0]), rest[1:]
			}
			continue
		}

		if i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(arg) }); i >= 0 &&
			len(pending) == 0 {
			out = append(out, arg)
			flags, commands = commands[i].Flags, commands[i].Subcommands
			continue
		}

		pending = append(pending, arg)
	}
	return all(pending)
}

// flagNamed is the flag that an argument is; nil if there is none.
func flagNamed(flags []cli.Flag, arg string) cli.Flag {
	name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

func takesValue(flags []cli.Flag, arg string) bool {
	f, ok := flagNamed(flags, arg).(cli.DocGenerationFlag)
	return ok && f.TakesValue() && !strings.Contains(arg, "=")
}

// selectors parses the arguments of a command that needs at least one.
func selectors(c *cli.Context) ([]iommu.Selector, error) {
	if !c.Args().Present() {
		return nil, usagef("%s: name a device (viaduct %s --help)", c.Command.Name, c.Command.Name)
	}
	return parseSelectors(c.Args().Slice())
}

func parseSelectors(args []string) ([]iommu.Selector, error) {
	out := make([]iommu.Selector, len(args))
	for i, a := range args {
		var err error
		if out[i], err = iommu.ParseArgument(a); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func oneArgument(c *cli.Context, what string) (string, error) {
	if c.NArg() != 1 {
		return "", usagef("%s: want one argument, %s (viaduct %s --help)", c.Command.Name, what, c.Command.Name)
	}
	return c.Args().First(), nil
}
