"""The study of the paper's method: eight questions, each a plan of experiments, and one page of all answers.

Run from a clone, in the environment of ``make venv``: ``python -m studies fewshot``, ``python -m studies report``. It
is no part of the package and stands on the public names of sylinit and on `sylinit.comparison`, to which it adds mixed
precision, fine-tuning, timing, forecasts, and figures and tables along an axis.

Data flows one way: `precision` -> `finetune`, `timing` -> `tasks`; `presets` -> `resume` -> `panels` -> `page`; the
command in `__main__` knows them all.
"""
