"""The built-in tools of a recipe, called in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tools.manager import processes
from tools.manager.errors import Problem
from tools.manager.recipes import Recipes

WORKER = Path(__file__).with_name("tool_worker.py")
SECONDS = 60  # by the clock; of a processor it has fewer, see tool_worker.py


class Toolbox:
    def __init__(self, recipes: Recipes):
        self.recipes = recipes
        self.known: list[dict] | None = None

    def folder(self) -> Path:
        """The recipe that has them."""
        for recipe in self.recipes.all():
            if (recipe.folder / "toolcall/tools.py").is_file():
                return recipe.folder
        raise Problem(404, "no recipe here has tools")

    def schemas(self) -> list[dict]:
        if self.known is None:
            self.known = self.ask({})["tools"]
        return self.known

    def call(self, name: str, arguments: dict) -> str:
        """What the tool gives, as text. Problem 400 where it refuses."""
        result = self.ask({"name": name, "arguments": arguments})["result"]
        try:
            said = json.loads(result)
        except ValueError:
            return result
        if isinstance(said, dict) and set(said) == {"error"}:
            raise Problem(400, str(said["error"]), name)
        return result

    def ask(self, what: dict) -> dict:
        try:
            done = subprocess.run(
                [sys.executable, str(WORKER), str(self.folder())],
                input=json.dumps(what).encode(),
                env=processes.environment(),
                capture_output=True,
                timeout=SECONDS,
            )
            return json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            raise Problem(400, f"the tool took more than {SECONDS} s", "name") from None
        except (ValueError, OSError):
            raise Problem(409, "the tools do not start") from None
