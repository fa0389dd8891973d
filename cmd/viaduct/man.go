package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"
)

// cli's own manual page goes by way of Markdown, whose parser takes half of the program's start-up time even where no
// page is asked for; the build tag urfave_cli_no_docs leaves it out.

func manCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:  "man",
		Usage: "print the manual page: viaduct man | man -l -",
		Action: func(c *cli.Context) error {
			writeMan(e.stdout, c.App)
			return nil
		},
	})
}

func writeMan(w io.Writer, app *cli.App) {
	fmt.Fprintf(w, ".TH %s 8\n.SH NAME\n%s \\- %s\n", strings.ToUpper(app.Name), app.Name, roff(app.Usage))
	fmt.Fprintf(w, ".SH SYNOPSIS\n.B %s\n", roff(app.UsageText))
	fmt.Fprintf(w, ".SH DESCRIPTION\n.nf\n%s\n.fi\n", roff(app.Description))
	fmt.Fprint(w, ".SH OPTIONS\n")
	manFlags(w, app.VisibleFlags())
	fmt.Fprint(w, ".SH COMMANDS\n")
	manCommands(w, app.Name, app.VisibleCommands())
}

func manCommands(w io.Writer, parent string, commands []*cli.Command) {
	for _, c := range commands {
		name := parent + " " + c.Name
		if len(c.Subcommands) > 0 {
			manCommands(w, name, c.VisibleCommands())
			continue
		}
		fmt.Fprintf(w, ".SS %s\n%s.\n", roff(strings.TrimSpace(name+" "+c.ArgsUsage)), roff(c.Usage))
		if c.Description != "" {
			fmt.Fprintf(w, ".PP\n.nf\n%s\n.fi\n", roff(c.Description))
		}
		manFlags(w, c.VisibleFlags())
	}
}

func manFlags(w io.Writer, flags []cli.Flag) {
	for _, f := range flags {
		names, text, _ := strings.Cut(f.String(), "\t")
		fmt.Fprintf(w, ".TP\n.B %s\n%s\n", roff(names), roff(text))
	}
}

// roff keeps a text from being taken for requests.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}
