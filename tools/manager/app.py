"""The manager's endpoints; the page in the browser and everybody else ask these.

Each speaks JSON; a mistake is {"error": {"message", "param"}}.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from common.runs import machine
from tools.manager import arguments, reports
from tools.manager.chat import Chat
from tools.manager.data_files import Datasets
from tools.manager.devices import Devices
from tools.manager.errors import Problem, add_handlers
from tools.manager.front import UPLOAD
from tools.manager.jobs import Jobs
from tools.manager.logs import Streams
from tools.manager.preview import MOST_ROWS, Previews, makes_token_rows
from tools.manager.recipes import Recipes
from tools.manager.settings import Settings
from tools.manager.starting import Start, Starter
from tools.manager.toolbox import Toolbox
from tools.manager.tutorial import client, routes
from tools.manager.weights import Weights

PAGE = Path(__file__).with_name("web") / "dist"
NO_PAGE = "The page is not built here; the endpoints below /api answer.\n"
EVENTS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Stop(BaseModel):
    model_config = ConfigDict(extra="forbid")
    job: str = Field(max_length=100)
    force: bool = False


class Remove(BaseModel):
    model_config = ConfigDict(extra="forbid")
    job: str = Field(max_length=100)


class OpenServer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    weights: str = Field(max_length=100)


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=100)
    arguments: dict[str, object] = {}


@dataclass
class Manager:
    """What the endpoints share."""

    settings: Settings
    recipes: Recipes
    datasets: Datasets
    weights: Weights
    devices: Devices
    jobs: Jobs
    starter: Starter
    streams: Streams
    previews: Previews
    chat: Chat
    toolbox: Toolbox
    tutorial: client.Worker
    began: float

    def start(self) -> None:
        self.devices.start()
        self.jobs.start()

    def close(self) -> None:
        """The jobs go on."""
        self.jobs.close()
        self.chat.close_all()
        self.tutorial.close()


def make_manager(settings: Settings, devices: list[dict] | None = None) -> Manager:
    """devices: those that are known before anything is asked, for tests."""
    recipes = Recipes(settings.root, settings.state / "flags")
    datasets = Datasets(settings, recipes)
    weights = Weights(settings)
    found = Devices(settings.state, devices)
    jobs = Jobs(settings.state, settings.root, found.names)
    return Manager(
        settings,
        recipes,
        datasets,
        weights,
        found,
        jobs,
        Starter(settings, recipes, datasets, weights, jobs),
        Streams(jobs),
        Previews(settings.root),
        Chat(settings.root, recipes),
        Toolbox(recipes),
        client.Worker(),
        time.time(),
    )


def build_app(manager: Manager) -> FastAPI:
    """The ASGI application without its Front."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False
    add_handlers(app)
    add_overview(app, manager)
    add_data(app, manager)
    add_training(app, manager)
    add_results(app, manager)
    add_chat(app, manager)
    app.include_router(routes.router(manager.tutorial, manager.weights.get))
    add_page(app)
    return app


# ---- overview ------------------------------------------------------------------------------------


def add_overview(app: FastAPI, manager: Manager) -> None:
    versions = machine.versions()

    @app.get("/api/status")
    def status():
        jobs = manager.jobs
        settings = manager.settings
        return {
            "version": versions.get("commit", ""),
            "versions": versions,
            "project": settings.root.name,
            "time": time.time(),
            "manager": {
                "pid": os.getpid(),
                "started": manager.began,
                "restarts": jobs.restarts,
            },
            "jobs": [jobs.public(job) for job in jobs.all()],
            "queue": [job.id for job in jobs.queue()],
            "token_required": settings.token is not None,
            "chosen": settings.chosen,
            "problem": jobs.problem(),
        }

    @app.get("/api/npu")
    def devices():
        return manager.devices.public(manager.jobs.busy())

    @app.get("/api/recipes")
    def recipes():
        return {"recipes": [recipe.public() for recipe in manager.recipes.all()]}

    @app.get("/api/recipes/{recipe}/flags")
    def flags(recipe: str, script: str = Query("train.py", max_length=200)):
        found = manager.recipes.get(recipe)
        name = manager.recipes.script(found, script)
        return {"groups": manager.recipes.flags(found, name)}

    @app.get("/api/weights")
    def weights():
        return {"weights": manager.weights.all()}


# ---- data ----------------------------------------------------------------------------------------


def add_data(app: FastAPI, manager: Manager) -> None:
    @app.get("/api/datasets")
    def datasets():
        return {"datasets": manager.datasets.all()}

    @app.post(UPLOAD)
    async def upload(request: Request):
        return {"dataset": await receive_file(manager, request)}

    @app.get("/api/datasets/preview")
    def preview(
        id: str = Query(max_length=100),
        recipe: str = Query(max_length=200),
        script: str = Query("train.py", max_length=200),
        rows: int = Query(5, ge=1, le=MOST_ROWS),
        model: str | None = Query(None, max_length=100),
        args: str = Query("{}", max_length=8000),
    ):
        data = manager.datasets.get(id)
        found = manager.recipes.get(recipe)
        name = manager.recipes.script(found, script)
        if not makes_token_rows(found.folder / name):
            raise Problem(400, f"{name} of {found.name} makes no token rows to show", "script")
        groups = manager.recipes.flags(found, name)
        words = manager.starter.flag_words(arguments.parsed(args), groups)
        words += manager.starter.data_words([id], groups)
        words += manager.starter.model_words(model, groups)
        facts = data.stat()
        key = (id, facts.st_mtime_ns, facts.st_size, recipe, name, rows, *words)
        one = manager.previews.get(key, found.folder / name, words, rows)
        if one.pending:
            return JSONResponse({"pending": True, "progress": one.said}, 202)
        if one.problem:
            manager.previews.forget(key)
            raise Problem(400, one.problem, "id")
        return one.answer


async def receive_file(manager: Manager, request: Request) -> dict:
    """A file of a form, kept under its name once all of it is here."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise Problem(400, "send the file as multipart/form-data", "file")
    try:
        form = await request.form(max_files=1, max_fields=4, max_part_size=4096)
    except HTTPException:
        raise Problem(400, "this is no form with a file", "file") from None
    except OSError as error:  # no room for it
        raise Problem(409, f"the file cannot be kept: {error.strerror}", "file") from None
    try:
        file = form.get("file")
        name = form.get("name")
        if file is None or isinstance(file, str):
            raise Problem(400, "the form has no file", "file")
        shown = name if isinstance(name, str) and name else file.filename or ""
        return await run_in_threadpool(keep_file, manager, file, shown)
    finally:
        await form.close()


def keep_file(manager: Manager, file, name: str) -> dict:
    datasets = manager.datasets
    part = None
    try:
        datasets.new_file(name)  # a name that is refused costs no copy
        handle, part = tempfile.mkstemp(prefix=".upload-", dir=manager.settings.uploads)
        with os.fdopen(handle, "wb") as copy:
            while data := file.file.read(1 << 20):
                copy.write(data)
        return datasets.keep(Path(part), name)
    except OSError as error:
        raise Problem(409, f"the file cannot be kept: {error.strerror}", "file") from None
    finally:
        if part and os.path.exists(part):
            os.unlink(part)


# ---- training ------------------------------------------------------------------------------------


def add_training(app: FastAPI, manager: Manager) -> None:
    jobs = manager.jobs

    @app.post("/api/train/start", status_code=201)
    def start(asked: Start):
        return {"job": jobs.public(manager.starter.start(asked))}

    @app.post("/api/train/stop")
    def stop(asked: Stop):
        return {"job": jobs.public(jobs.stop(asked.job, asked.force))}

    @app.post("/api/train/remove")
    def remove(asked: Remove):
        return {"job": {"id": jobs.remove(asked.job).id}}

    @app.get("/api/train/logs")
    async def logs(
        job: str = Query(max_length=100),
        after: int = Query(0, ge=0, le=1 << 40),
        last_event_id: str | None = Header(None, max_length=20),
    ):
        found = jobs.get(job)
        manager.streams.refuse_too_many()
        if last_event_id and last_event_id.isascii() and last_event_id.isdigit():
            after = int(last_event_id)
        events = manager.streams.events(found, after)
        return StreamingResponse(events, media_type="text/event-stream", headers=EVENTS)

    @app.get("/api/train/metrics")
    def metrics(job: str = Query(max_length=100), after: int = Query(-1, ge=-1, le=1 << 40)):
        series = jobs.series(jobs.get(job))
        later = {
            name: [point for point in points if point[0] > after] for name, points in series.items()
        }
        return {"series": later}


# ---- results -------------------------------------------------------------------------------------


def add_results(app: FastAPI, manager: Manager) -> None:
    def place(job: str | None, weights: str | None) -> tuple[Path, dict[str, str]]:
        if (job is None) == (weights is None):
            raise Problem(400, "give job or weights", "job")
        if job is not None:
            return Path(manager.jobs.get(job).output), {"job": job}
        return manager.weights.get(weights), {"weights": weights}

    @app.get("/api/report")
    def report(
        job: str | None = Query(None, max_length=100),
        weights: str | None = Query(None, max_length=100),
    ):
        folder, query = place(job, weights)
        return reports.report(folder, **query)

    @app.get("/api/report/picture")
    def picture(
        name: str = Query(max_length=200),
        job: str | None = Query(None, max_length=100),
        weights: str | None = Query(None, max_length=100),
    ):
        folder, _ = place(job, weights)
        return FileResponse(reports.picture(folder, name), media_type="image/png")

    @app.get("/api/evaluations")
    def evaluations():
        return reports.evaluations(manager.weights)


# ---- talking -------------------------------------------------------------------------------------


def add_chat(app: FastAPI, manager: Manager) -> None:
    chat = manager.chat

    @app.post("/api/chat/servers", status_code=201)
    def open_server(asked: OpenServer):
        folder = None
        recipe = None
        if asked.weights != "tiny":
            folder = manager.weights.get(asked.weights)
            recipe = manager.weights.public(folder)["recipe"]
        server, is_new = chat.open(asked.weights, folder, recipe)
        return JSONResponse({"server": server.public()}, 201 if is_new else 200)

    @app.get("/api/chat/servers")
    def servers():
        return {"servers": chat.all()}

    @app.delete("/api/chat/servers/{server}")
    def close_server(server: str):
        chat.close(server)
        return {"server": {"id": server}}

    @app.post("/api/chat/{server}/v1/chat/completions")
    async def chats(server: str, request: Request):
        return await chat.passed(server, "/v1/chat/completions", request)

    @app.post("/api/chat/{server}/v1/completions")
    async def texts(server: str, request: Request):
        return await chat.passed(server, "/v1/completions", request)

    @app.get("/api/chat/{server}/v1/models")
    async def models(server: str, request: Request):
        return await chat.passed(server, "/v1/models", request)

    @app.get("/api/tools")
    def tools():
        return {"tools": manager.toolbox.schemas()}

    @app.post("/api/tools/call")
    def call(asked: ToolCall):
        return {"result": manager.toolbox.call(asked.name, asked.arguments)}


# ---- the page ------------------------------------------------------------------------------------


def add_page(app: FastAPI) -> None:
    if (PAGE / "index.html").is_file():
        app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
        return

    @app.get("/")
    def no_page():
        return PlainTextResponse(NO_PAGE)
