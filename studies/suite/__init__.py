"""A suite of small tasks on which initializations are compared: many kinds of networks, many kinds of data.

``python -m studies.suite list``, ``run`` and ``report``; see ``README.md`` beside this file.
"""
