package main

import (
	"fmt"

	"github.com/urfave/cli/v2"
)

// Completion scripts: each hands the words so far, of which the last may be empty, to the program, which answers with
// one candidate a line. Where there is none, files are offered.
const (
	bashCompletion = `_viaduct() {
  local typed=${COMP_LINE:0:COMP_POINT} words cur=
  read -ra words <<<"$typed" # not COMP_WORDS, which cuts addresses at their colons
  [[ $typed == *' ' ]] || { cur=${words[-1]}; unset 'words[-1]'; }
  mapfile -t COMPREPLY < <("${words[@]}" "$cur" --generate-bash-completion 2>/dev/null)
  [[ $cur == *[:=]* ]] && COMPREPLY=("${COMPREPLY[@]#"${cur%"${cur##*[:=]}"}"}")
  [[ ${COMPREPLY[*]} == *= ]] && compopt -o nospace
}
complete -o default -F _viaduct viaduct
`
	zshCompletion = `#compdef viaduct
_viaduct() {
  local -a all keys
  all=("${(@f)$(${words[1,CURRENT-1]} "$PREFIX" --generate-bash-completion 2>/dev/null)}")
  keys=("${(@M)all:#*=}") all=("${(@)all:#(*=|)}")
  (( $#all + $#keys )) || { _files; return; }
  compadd -a all
  compadd -S '' -a keys
}
if [ "$funcstack[1]" = _viaduct ]; then _viaduct "$@"; else compdef _viaduct viaduct; fi
`
	fishCompletion = `function __viaduct
  set -l words (commandline -opc)
  set -l all ($words (commandline -ct) --generate-bash-completion 2>/dev/null)
  if set -q all[1]
    printf '%s\n' $all
  else
    __fish_complete_path (commandline -ct)
  end
end
complete -c viaduct -f -a '(__viaduct)'
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
		BashComplete: func(*cli.Context) { e.suggest("bash", "zsh", "fish") },
		Action: func(c *cli.Context) error {
			shell, err := oneArgument(c, "the shell: bash, zsh or fish")
			if err != nil {
				return err
			}
			script, ok := scripts[shell]
			if !ok {
				return usagef("completion: unknown shell %q; want bash, zsh or fish", shell)
			}
			fmt.Fprint(e.stdout, script)
			return nil
		},
	})
}
