"""The training manager: starts and watches trainings of all recipes, for a page in the browser."""
