"""The HTTP edge: thin routes that parse, authorise, call and shape. Decisions and SQL live elsewhere.

``/api/v1`` is for people and programs with a bearer token, ``/device/v1`` for devices, ``/repository`` serves the update repository's
files. Errors have one shape: ``{"error": {"code", "message", "details"?}}``; lists are ``{"items": [...], "next": cursor or null}``.
"""
