package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/iommu"
)

// Completion scripts: each hands the words so far to the program, which answers with one candidate a line.
const (
	bashCompletion = `_viaduct() {
  local typed=${COMP_LINE:0:COMP_POINT} words cur= line
  read -ra words <<<"$typed" # not COMP_WORDS, which cuts addresses at their colons
  [[ $typed == *' ' ]] || { cur=${words[-1]}; unset 'words[-1]'; }
  COMPREPLY=()
  while IFS= read -r line; do
    [[ $line == "$cur"* ]] && COMPREPLY+=("$line")
  done < <("${words[@]}" --generate-bash-completion 2>/dev/null)
  [[ $cur == *[:=]* ]] && COMPREPLY=("${COMPREPLY[@]#"${cur%"${cur##*[:=]}"}"}")
  [[ ${COMPREPLY[*]} == *= ]] && compopt -o nospace
}
complete -o default -F _viaduct viaduct
`
	zshCompletion = `#compdef viaduct
_viaduct() {
  local -a candidates
  candidates=("${(@f)$(${words[1,CURRENT-1]} --generate-bash-completion 2>/dev/null)}")
  compadd -a candidates || _files
}
if [ "$funcstack[1]" = _viaduct ]; then _viaduct "$@"; else compdef _viaduct viaduct; fi
`
	fishCompletion = `complete -c viaduct -f -a '(set -l words (commandline -opc); $words --generate-bash-completion 2>/dev/null)'
complete -c viaduct -n '__fish_seen_subcommand_from snapshot' -F
complete -c viaduct -l host -r -F
`
)

func completionCommand(e *env) *cli.Command {
	scripts := map[string]string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}
	return command(&cli.Command{
		Name:      "completion",
		Usage:     "print the completion script of a shell",
		ArgsUsage: "bash|zsh|fish",
		Description: "Examples:\n  viaduct completion bash > /etc/bash_completion.d/viaduct\n" +
			"  viaduct completion zsh > \"${fpath[1]}/_viaduct\"\n" +
			"  viaduct completion fish > ~/.config/fish/completions/viaduct.fish",
		BashComplete: func(*cli.Context) { fmt.Fprintln(e.stdout, "bash\nzsh\nfish") },
		Action: func(c *cli.Context) error {
			shell, err := oneArgument(c, "the shell: bash, zsh or fish")
			if err != nil {
				return err
			}
			script, ok := scripts[shell]
			if !ok {
				return usagef("completion: unknown shell %q; want bash, zsh or fish", shell)
			}
			_, err = fmt.Fprint(e.stdout, script)
			return err
		},
	})
}

// complete prints what f gives for each device, and the command's flags when one is begun.
func (e *env) complete(c *cli.Context, f func(*iommu.Device) []string) {
	for _, flag := range c.Command.Flags {
		fmt.Fprintln(e.stdout, "--"+flag.Names()[0])
	}
	e.printEach(e.selectorsOf(f))
}

// harmless reports whether a name, which may come from a stranger's snapshot, means nothing to a shell.
func harmless(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') &&
			!strings.ContainsRune("._:/@=-", rune(c)) {
			return false
		}
	}
	return true
}

func (e *env) completeSelectors(c *cli.Context) {
	e.complete(c, func(d *iommu.Device) []string {
		out := append(ownWords(d), keyedWords(d)...)
		if d.PhysFn != nil {
			out = append(out, vfSelector(d))
		}
		return out
	})
	e.printEach(iommu.Words())
}

func (e *env) completePFs(c *cli.Context) {
	e.complete(c, func(d *iommu.Device) []string {
		if d.SRIOV == nil {
			return nil
		}
		return ownWords(d)
	})
}

func (e *env) completeVFs(c *cli.Context) {
	e.complete(c, func(d *iommu.Device) []string {
		if d.PhysFn == nil {
			return nil
		}
		return []string{d.Name, vfSelector(d)}
	})
}

func vfSelector(d *iommu.Device) string {
	return strings.Join([]string{d.PhysFn.String(), fmt.Sprintf("vf%d", d.VFIndex)}, "/")
}
