"""The page for people: what the fleet runs, the rollout under way, drift, recent decisions. Server-rendered; reads only."""
