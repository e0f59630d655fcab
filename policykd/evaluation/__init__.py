"""Full episodes, statistics, the teacher check, and what a policy costs."""
