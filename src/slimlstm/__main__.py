"""``python -m slimlstm``, the same as the command ``slimlstm``."""

from slimlstm.cli import main

if __name__ == "__main__":
    main()
