"""Convert checkpoints between this project, the official program, detrex and Hugging Face's form; see --help."""

import sys

from dino.cli.convert import main

from dino.utils.files import UserError, message_of

if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {message_of(error)}")
