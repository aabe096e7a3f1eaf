"""Pages that need no network and no script: charts as pictures, tables behind them, one file."""
