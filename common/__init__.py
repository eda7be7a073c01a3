"""The shared kitchen under the recipes: data, chat labels, collators, losses, trainer, devices."""
