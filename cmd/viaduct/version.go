package main

import (
	"fmt"
	"runtime/debug"
	"strings"

	"github.com/urfave/cli/v2"
)

// A build that does not know its commit, as one of an archive, can be told: -ldflags "-X main.version=1.2
// -X main.commit=0123456789ab".
var version, commit = "", ""

// build is what the program was made of.
type build struct{ version, commit, date, goVersion string }

// buildVersion is that of this program: what the linker was told, else what the compiler wrote down.
func buildVersion() build {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	return describeBuild(info)
}

func describeBuild(info *debug.BuildInfo) build {
	b := build{version: version, commit: commit, goVersion: info.GoVersion}
	if b.version == "" && info.Main.Version != "(devel)" {
		b.version = info.Main.Version
	}
	if b.version == "" {
		b.version = "development"
	}
	if b.commit != "" {
		return b
	}
	modified := false
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.commit = s.Value[:min(len(s.Value), 12)]
		case "vcs.time":
			b.date = s.Value
		case "vcs.modified":
			modified = s.Value == "true"
		}
	}
	if modified && b.commit != "" {
		b.commit += " with changes"
	}
	return b
}

func (b build) String() string {
	var more []string
	if b.commit != "" {
		more = append(more, "commit "+b.commit)
	}
	if b.date != "" {
		more = append(more, b.date)
	}
	if b.goVersion != "" {
		more = append(more, b.goVersion)
	}
	if len(more) == 0 {
		return b.version
	}
	return b.version + " (" + strings.Join(more, ", ") + ")"
}

func versionCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:  "version",
		Usage: "print the version, and the commit that it was built from",
		Action: func(*cli.Context) error {
			fmt.Fprintln(e.stdout, "viaduct", buildVersion())
			return nil
		},
	})
}
