"""From a request to a job: recipe, script, flags, data, weights and devices, each checked."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from tools.manager.arguments import words_of
from tools.manager.errors import Problem
from tools.manager.job import Job
from tools.manager.jobs import Jobs
from tools.manager.recipes import Recipe, Recipes
from tools.manager.settings import Settings

TINY = "tiny"


class WeightedDataset(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str = Field(max_length=100)
    weight: float | None = Field(None, gt=0, le=1e6)


class Start(BaseModel):
    """resume: a job whose run goes on with its own flags; of the other fields only name and devices
    may stand beside it."""

    model_config = ConfigDict(extra="forbid")
    recipe: str | None = Field(None, max_length=200)
    script: str | None = Field(None, max_length=200)
    launcher: str | None = Field(None, max_length=200)
    args: dict[str, object] = {}
    dataset: list[str | WeightedDataset] = Field([], max_length=50)
    model: str | None = Field(None, max_length=100)
    devices: list[str | int] | None = Field(None, max_length=64)
    resume: str | None = Field(None, max_length=100)
    name: str = Field("", max_length=100)


class Starter:
    """Makes jobs of requests."""

    def __init__(self, settings: Settings, recipes: Recipes, datasets, weights, jobs: Jobs):
        self.settings = settings
        self.recipes = recipes
        self.datasets = datasets
        self.weights = weights
        self.jobs = jobs

    def start(self, asked: Start) -> Job:
        if asked.resume is not None:
            return self.resume(asked)
        recipe = self.recipes.get(asked.recipe)
        if asked.script and asked.launcher:
            raise Problem(400, "give script or launcher, not both", "launcher")
        chosen = asked.launcher or asked.script or "train.py"
        script = self.recipes.script(recipe, chosen)
        groups = self.recipes.flags(recipe, script)
        words = self.flag_words(asked.args, groups)
        words += self.model_words(asked.model, groups)
        words += self.data_words(asked.dataset, groups)
        devices = self.chosen_devices(asked.devices)
        shown = printable(asked.name) or recipe.name
        with self.jobs.lock:  # the number in the folder's name is the job's
            output = self.new_output(shown, recipe.name)
            return self.jobs.add(
                name=shown,
                recipe=recipe.name,
                script=chosen,
                args=asked.args,
                dataset=[self.plain(one) for one in asked.dataset],
                model=asked.model,
                argv=self.command(recipe, chosen, script, words, groups, output, devices),
                env={"OUTPUT": str(output)} if chosen.endswith(".sh") else {},
                output=str(output),
                devices=devices,
            )

    def resume(self, asked: Start) -> Job:
        """The same command once more, on the same output."""
        fixed = ("recipe", "script", "launcher", "args", "dataset", "model")
        for name in fixed:
            if getattr(asked, name):
                raise Problem(400, f"{name}: a run that goes on keeps its own", name)
        job = self.jobs.get(asked.resume)
        if not self.jobs.resumable(job):
            told = f"job {job.id} is {job.state} and cannot go on"
            raise Problem(409, told, "resume")
        devices = job.devices
        if asked.devices is not None:
            devices = self.chosen_devices(asked.devices)
            if len(devices) != len(job.held):
                told = f"it ran on {len(job.held)} device(s), and goes on with as many"
                raise Problem(400, told, "devices")
        return self.jobs.add(
            name=printable(asked.name) or job.name,
            recipe=job.recipe,
            script=job.script,
            args=job.args,
            dataset=job.dataset,
            model=job.model,
            argv=job.argv,
            env=job.env,
            output=job.output,
            devices=devices,
            continues=job.id,
        )

    def places(self) -> list[Path]:
        """Folders that a path in a flag may lie in."""
        recipes = [recipe.folder for recipe in self.recipes.all()]
        own = [self.settings.uploads, self.settings.outputs]
        return [*recipes, *own, *self.settings.weights, *self.settings.datasets]

    def flag_words(self, args: dict, groups: list) -> list[str]:
        return words_of(args, groups, self.places(), self.settings.root)

    def plain(self, one: str | WeightedDataset) -> str | dict:
        return one if isinstance(one, str) else one.model_dump()

    def model_words(self, model: str | None, groups: list) -> list[str]:
        if model is None:
            return []
        if not has_flag(groups, "--model_name_or_path"):
            raise Problem(400, "this script takes no model", "model")
        path = TINY if model == TINY else self.weights.get(model)
        return [f"--model_name_or_path={path}"]

    def data_words(self, asked: list, groups: list) -> list[str]:
        if not asked:
            return []
        if not has_flag(groups, "--data_path"):
            raise Problem(400, "this script takes no data", "dataset")
        words = []
        for one in asked:
            name, weight = id_and_weight(one)
            path = self.datasets.get(name)
            if len(asked) > 1 and re.search(r"\s", str(path)):
                raise Problem(400, "a file with blanks in its name is trained alone", "dataset")
            words.append(f"{path}" if weight is None else f"{path}:{weight:g}")
        return [f"--data_path={' '.join(words)}"]

    def chosen_devices(self, asked: list | None) -> list[str] | None:
        if asked is None:
            return None
        names = [str(one) for one in asked]
        there = self.jobs.devices()
        if not names or len(set(names)) < len(names):
            raise Problem(400, "name each device once", "devices")
        if there and not set(names) <= set(there):
            raise Problem(400, f"this machine has {', '.join(there)}", "devices")
        return sorted(names, key=lambda name: (len(name), name))

    def new_output(self, *names: str) -> Path:
        """A folder for the run, called by the first name that has letters for it; the number of the
        job makes it a new one."""
        plain = [re.sub(r"[^\w-]+", "_", name, flags=re.ASCII).strip("_")[:40] for name in names]
        word = next(filter(None, plain), "run")
        return self.settings.outputs / f"{self.jobs.next_number():04d}_{word}"

    def command(self, recipe: Recipe, chosen, script, words, groups, output, devices) -> list[str]:
        if chosen.endswith(".sh"):  # it takes OUTPUT
            return ["bash", str(recipe.folder / chosen), *words]
        if has_flag(groups, "--output_dir"):
            words = [*words, f"--output_dir={output}"]
        file = str(recipe.folder / script)
        count = len(devices or self.jobs.devices())
        if not count:
            told = "the devices of this machine are still being asked for; try again in a moment"
            raise Problem(409, told, "devices", retry_after="5")
        if count > 1:
            launcher = str(recipe.folder.parent / "common/launch.py")
            return [sys.executable, launcher, str(count), file, *words]
        return [sys.executable, file, *words]


def has_flag(groups: list, name: str) -> bool:
    flags = [flag for group in groups for flag in group["flags"]]
    return any(name in (flag["name"], *flag["aliases"]) for flag in flags)


def id_and_weight(one: str | WeightedDataset) -> tuple[str, float | None]:
    """ "ID", "ID:0.7" or {"id", "weight"}."""
    if isinstance(one, WeightedDataset):
        return one.id, one.weight
    name, colon, text = one.partition(":")
    if not colon:
        return name, None
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text) or float(text) == 0:
        raise Problem(400, "a weight is a number above 0: ID:0.7", "dataset")
    return name, float(text)


def printable(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable()).strip()
