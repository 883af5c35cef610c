"""`var train`: the two stages of training as commands."""

import typer

from varcli.commands.train_tokenizer import tokenizer
from varcli.commands.train_transformer import transformer

train_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a tokenizer, then a transformer on its tokens. A stopped run goes on with the same command.",
)
train_app.command("tokenizer")(tokenizer)
train_app.command("transformer")(transformer)
