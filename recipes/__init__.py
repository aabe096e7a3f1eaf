raise ModuleNotFoundError(
    "recipes are programs to run and to copy from, not a package to import; use `python recipes/NAME.py` or slimlstm's API"
)
