"""The worker: one process that serves one generation of models, and counts what they do.

It speaks the Open Inference Protocol to applications (``server``, ``oip``, ``http1``), runs models through
``skerry_runtime`` (``inference``), records every request before it is answered (``recorder``, ``ring``), folds the records
into windows (``fold``), and passes its connections to its successor (``handover``). What to run, when to start, drain and
stop is the supervisor's to say, over ``skerry_agent.workerwire``.
"""
