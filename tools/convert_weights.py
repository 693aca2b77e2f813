"""Convert checkpoints between this project, the official program, detrex and Hugging Face's form; see --help."""

import sys

from dino.utils.files import DataError, message_of
from dino.weights.conversion import main

if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {message_of(error)}")
