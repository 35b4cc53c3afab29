"""Names of the files in a run directory that more than training reads."""

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
