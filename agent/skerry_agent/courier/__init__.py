"""The courier: a short-lived process that fetches, verifies and goes.

Owns everything a device does over HTTPS: enrolment, TUF metadata, manifests, the files of bundles. What it needs (tuf,
cryptography, ssl) is heavy and used for seconds a day, so it lives here and not in the supervisor. Each verb imports only
what it uses; ``fetch`` runs without tuf and cryptography.

Left to others: what to run and when (the supervisor), and what a slot becomes after its files are here.
"""
