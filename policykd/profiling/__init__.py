"""What policies cost in every runtime: `profile` asks, `deployments` makes files, `runtimes` runs them elsewhere."""
