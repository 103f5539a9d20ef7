"""The command ``completion``: what a shell needs to complete our command line."""

import click
from click.shell_completion import get_completion_class

from vfsmap_tools.console import errors_exit

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@errors_exit
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  eval "$(vfsmap completion bash)"      in ~/.bashrc
    zsh:   eval "$(vfsmap completion zsh)"       in ~/.zshrc, after compinit
    fish:  vfsmap completion fish | source       in ~/.config/fish/config.fish
    """
    click.echo(script(shell))


def script(shell: str) -> str:
    """Return the completion script of a shell."""
    maker = get_completion_class(shell)
    assert maker is not None, shell
    return maker(click.Group("vfsmap"), {}, "vfsmap", "_VFSMAP_COMPLETE").source()
