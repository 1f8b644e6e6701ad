"""Whether an initialization computed from data is worth it: one network, trained alike from several initializations.

What ``sylinit demo``, ``sylinit init`` and ``sylinit compare`` are made of; ``pip install sylinit[cli]`` brings what it
needs. It stands on the public names of sylinit, and ``import sylinit`` does not load it.

Data flows one way: `data`, `models` -> `initializations` -> `training` -> `runs` -> `runner` -> `summary` -> `figures`.
An `Experiment` says what is run, a `Plan` which experiments make a comparison, a `Store` keeps what came out.
"""
