"""The operator's and the CI's tool: ceremony, bundles, approvals, rollouts, devices, and the demo."""

__version__ = "0.1.0"
