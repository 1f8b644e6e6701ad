"""Experiments that answer whether a start computed from data is worth it: data, models, starts, training, figures.

Data flows one way: `data` and `models` -> `starts` -> `train` -> `runner` -> `statistics` -> `figures` -> `page`.
Needs ``pip install sylinit[study]``; nothing outside this package imports it, except the commands.
"""
