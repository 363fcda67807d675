"""The verb `completion`: a script with which a shell completes verbs, options and names of runs."""

import argparse
from collections.abc import Mapping, Sequence

# zsh runs it by its own emulation of bash. What is neither is a file's name, to the shell.
_SCRIPT = """\
[ -n "$ZSH_VERSION" ] && autoload -U +X compinit bashcompinit && compinit && bashcompinit
_amortize() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    if [ "$COMP_CWORD" = 1 ]; then
        words="{verbs}"
    elif [ "$before" = --run ] || [ "$before" = --of ]; then
        words=$(ls "${{AMORTIZE_RUNS:-runs}}" 2> /dev/null)
    elif [ "${{word#-}}" != "$word" ]; then
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _amortize amortize
"""


def run(arguments: argparse.Namespace) -> int:
    """Print it; `eval "$(amortize completion)"` takes it up."""
    print(script(arguments.options), end="")
    return 0


def script(options: Mapping[str, Sequence[str]]) -> str:
    """The script, of every verb with its options."""
    cases = [
        f"""        {verb}) words="{" ".join([*names, "--help"])}" ;;"""
        for verb, names in options.items()
    ]
    return _SCRIPT.format(verbs=" ".join(options), cases="\n".join(cases))
