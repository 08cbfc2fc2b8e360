"""The embedded broker, and configurations for others."""
