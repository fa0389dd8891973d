package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/vmm"
	"viaduct/cmd/viaduct/docs"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// The library asks a variable of its own for the printer of help, for all applications alike.
func init() { cli.HelpPrinter = func(w io.Writer, _ string, of any) { printHelp(w, of) } }

func printHelp(w io.Writer, of any) {
	switch of := of.(type) {
	case *cli.App:
		fmt.Fprint(w, docs.Text(appHelp(of)))
	case *cli.Command:
		fmt.Fprint(w, docs.Text(commandHelp(of.HelpName, of)))
	}
}

// appHelp is the help of the whole program.
func appHelp(app *cli.App) string {
	var out strings.Builder
	fmt.Fprintf(&out, "%s: %s\n\n    %s\n\n", app.Name, app.Usage, app.UsageText)
	heading := ""
	for _, c := range app.VisibleCommands() {
		if c.Category != heading {
			heading = c.Category
			fmt.Fprintf(&out, "\n## %s\n\n", heading)
		}
		writeLine(&out, c)
	}
	out.WriteString("\n## Options\n\n")
	writeFlags(&out, app.VisibleFlags())
	fmt.Fprintf(&out, "\n%s\n", app.Description)
	return out.String()
}

// commandHelp is the help of a command, which is called by that name.
func commandHelp(name string, c *cli.Command) string {
	var out strings.Builder
	fmt.Fprintf(&out, "%s\n\n", synopsis(name, c))
	writeCommand(&out, c)
	if len(c.Subcommands) > 0 {
		out.WriteString("\n## Commands\n\n")
		for _, sub := range c.VisibleCommands() {
			writeLine(&out, sub)
		}
	}
	if flags := ownFlags(c); len(flags) > 0 {
		out.WriteString("\n## Options\n\n")
		writeFlags(&out, flags)
	}
	return out.String()
}

func synopsis(name string, c *cli.Command) string {
	words := []string{name}
	switch {
	case len(c.Subcommands) > 0:
		words = append(words, "COMMAND")
	case len(ownFlags(c)) > 0:
		words = append(words, "[OPTION...]")
	}
	if c.ArgsUsage != "" {
		words = append(words, c.ArgsUsage)
	}
	return "Usage: " + strings.Join(words, " ")
}

// writeLine is a command in a list of commands.
func writeLine(out *strings.Builder, c *cli.Command) {
	fmt.Fprintf(out, "    %-11s%s\n", c.Name, c.Usage)
}

// writeCommand writes what a command does, with its examples, which are indented by two spaces in its description.
func writeCommand(out *strings.Builder, c *cli.Command) {
	fmt.Fprintf(out, "%s.\n\n", strings.ToUpper(c.Usage[:1])+c.Usage[1:])
	code := false
	for line := range strings.Lines(c.Description) {
		text, indented := strings.CutPrefix(line, "  ")
		if indented != code {
			out.WriteString("\n")
		}
		if code = indented; code {
			text = "    " + text
		}
		out.WriteString(text)
	}
	out.WriteString("\n")
}

// ownFlags are the flags of a command that its help tells of: each has --help.
func ownFlags(c *cli.Command) []cli.Flag {
	return slices.DeleteFunc(slices.Clone(c.VisibleFlags()), func(f cli.Flag) bool { return f.Names()[0] == "help" })
}

func writeFlags(out *strings.Builder, flags []cli.Flag) {
	for _, f := range flags {
		name, text := flagText(f)
		fmt.Fprintf(out, "- `%s`: %s\n", name, text)
	}
}

// flagText is a flag with what it takes, and what it does.
func flagText(f cli.Flag) (name, text string) {
	var names []string
	for _, n := range f.Names() {
		names = append(names, strings.Repeat("-", min(len(n), 2))+n)
	}

	name = strings.Join(names, ", ")
	d, ok := f.(cli.DocGenerationFlag)
	if !ok {
		return name, ""
	}

	parts := strings.SplitN(d.GetUsage(), "`", 3)
	value := "VALUE"
	switch {
	case len(parts) == 3:
		value = parts[1]
	default:
		switch f.(type) {
		case *cli.DurationFlag:
			value = "TIME"
		case *cli.IntFlag:
			value = "N"
		}
	}

	text = strings.Join(parts, "")
	if !d.TakesValue() {
		return name, text
	}

	unset := []string{"", `""`, "0", "-1", "0s"}
	if normal := strings.Trim(d.GetDefaultText(), `"`); !slices.Contains(unset, normal) {
		text += " (default: " + normal + ")"
	}

	return name + " " + value, text
}

// manual is the manual, with what the program's tables have to say in it.
func manual(app *cli.App) []docs.Topic {
	made := map[string]string{
		"commands": commandsText(app), "kinds": kindsText(), "settings": settingsHelp(), "formats": formatsText(),
		"keys": keysText(), "words": "`" + strings.Join(iommu.Words(), "`, `") + "`\n",
	}
	return docs.Topics(made)
}

func commandsText(app *cli.App) string {
	var out strings.Builder
	var write func(name string, commands []*cli.Command)
	write = func(name string, commands []*cli.Command) {
		for _, c := range commands {
			if len(c.Subcommands) > 0 {
				write(name+" "+c.Name, c.VisibleCommands())
				continue
			}
			fmt.Fprintf(&out, "## %s\n\n", strings.TrimPrefix(synopsis(name+" "+c.Name, c), "Usage: "))
			writeCommand(&out, c)
			out.WriteString("\n")
			writeFlags(&out, ownFlags(c))
			out.WriteString("\n")
		}
	}
	write(app.Name, app.VisibleCommands())
	return out.String()
}

func kindsText() string {
	var out strings.Builder
	for _, kind := range holder.Kinds() {
		fmt.Fprintf(&out, "- `%s`: %s\n", kind, kind.Means())
	}
	return out.String()
}

func formatsText() string {
	var out strings.Builder
	for _, f := range vmm.Formats {
		fmt.Fprintf(&out, "- `%s`: %s\n", f.Name, cmp.Or(f.Cannot, "no restrictions"))
	}
	return out.String()
}

// keysText is the reference of host.yaml.
func keysText() string {
	var out strings.Builder
	for _, section := range hostfile.Reference() {
		fmt.Fprintf(&out, "## %s\n\n", section.Name)
		for _, key := range section.Keys {
			fmt.Fprintf(&out, "- `%s`: %s\n", key.Name, key.Help)
		}
		out.WriteString("\n")
	}
	return out.String()
}

func helpCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:      "help",
		Usage:     "print the help of a command, or a topic of the manual",
		ArgsUsage: "[COMMAND|TOPIC]",
		Description: "`viaduct help topics` lists the topics.\n\n" +
			"Examples:\n  viaduct help bind\n  viaduct help gpu",
		BashComplete: func(c *cli.Context) {
			for _, t := range manual(c.App) {
				e.suggest(t.Name)
			}
			for _, command := range c.App.VisibleCommands() {
				e.suggest(command.Name)
			}
		},
		Action: func(c *cli.Context) error { return runHelp(e, c.App, c.Args().Slice()) },
	})
}

func runHelp(e *env, app *cli.App, words []string) error {
	if len(words) == 0 {
		printHelp(e.stdout, app)
		return nil
	}
	if c := findCommand(app, words); c != nil {
		fmt.Fprint(e.stdout, docs.Text(commandHelp(app.Name+" "+strings.Join(words, " "), c)))
		return nil
	}
	topics := manual(app)
	name := strings.Join(words, " ")
	if name == "topics" {
		for _, t := range topics {
			fmt.Fprintf(e.stdout, "%-14s%s\n", t.Name, t.About)
		}
		return nil
	}
	t, ok := docs.Find(topics, name)
	if !ok {
		return usagef("help: there is no command and no topic %q: `viaduct help` lists the commands, and "+
			"`viaduct help topics` the topics", name)
	}
	fmt.Fprint(e.stdout, docs.Text(t.Text))
	return nil
}

func findCommand(app *cli.App, words []string) *cli.Command {
	commands := app.Commands
	for i, word := range words {
		at := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(word) })
		if at < 0 {
			return nil
		}
		if i == len(words)-1 {
			return commands[at]
		}
		commands = commands[at].Subcommands
	}
	return nil
}

func manCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:      "man",
		Usage:     "print a manual page",
		ArgsUsage: "[PAGE]",
		Description: "The pages are viaduct(8), which is the default, host.yaml(5) and viaduct-json(5).\n\n" +
			"Examples:\n  viaduct man | man -l -\n  viaduct man host.yaml | man -l -",
		BashComplete: func(*cli.Context) {
			for _, p := range docs.Pages {
				e.suggest(p.Name)
			}
		},
		Action: func(c *cli.Context) error {
			name := "viaduct"
			switch {
			case c.NArg() > 1:
				return usagef("man: want one page")
			case c.NArg() == 1:
				name = c.Args().First()
			}
			i := slices.IndexFunc(docs.Pages, func(p docs.Page) bool { return p.Name == name })
			if i < 0 {
				return usagef("man: there is no page %q; the pages are viaduct, host.yaml and viaduct-json", name)
			}
			fmt.Fprint(e.stdout, manPage(c.App, docs.Pages[i]))
			return nil
		},
	})
}

func manPage(app *cli.App, p docs.Page) string {
	return docs.Man(p, buildVersion().version, manual(app))
}
