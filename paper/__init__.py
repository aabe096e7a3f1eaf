"""Reproduce Winata et al. (2019): models, tasks, analysis and plots that the library itself does not need."""
