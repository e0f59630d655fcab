"""Where agents play. Nothing here knows of agents or of learning."""
